"""Every engine on the same few steps, for test_engine.py; importing DeepSpeed is slow, so one process does all.

    torchrun --nproc_per_node 2 engine_cases.py OUT   trains, resumes and saves; writes OUT/world-2.json
    torchrun --nproc_per_node 1 engine_cases.py OUT   continues on one rank what two have saved
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmtrain.config import Config, UserError
from mmtrain.models import Decoder, build_model
from mmtrain.train.distributed import World, start_world
from mmtrain.train.engine import Engine, build_engine

VOCABULARY, ROWS, LENGTH = 256, 8, 32
HALF, STEPS = 3, 6
FP32 = {"ddp": ("ddp", 0, "fp32")} | {f"zero{stage}": ("deepspeed", stage, "fp32") for stage in range(4)}
BF16 = {"ddp-bf16": ("ddp", 0, "bf16")} | {f"zero{stage}-bf16": ("deepspeed", stage, "bf16") for stage in (1, 2, 3)}
OFFLOAD = {f"zero{stage}-offload": ("deepspeed", stage, "fp32") for stage in (1, 2, 3)}
OFFLOAD |= {"zero3-offload-parameters": ("deepspeed", 3, "fp32"), "zero1-offload-bf16": ("deepspeed", 1, "bf16")}
OFFLOAD |= {"zero3-offload-all-bf16": ("deepspeed", 3, "bf16")}
MUON = {"ddp-muon": ("ddp", 0, "fp32"), "ddp-muon-bf16": ("ddp", 0, "bf16")}
ALL = FP32 | BF16 | OFFLOAD | MUON
State = dict[str, Tensor]


def configure(name: str) -> Config:
    """A small model whose gradients are large enough to be clipped at every step."""
    kind, stage, dtype = ALL[name]
    config = Config()
    config.optim.kind = "muon" if name in MUON else "adamw"
    config.engine.kind, config.engine.stage, config.engine.dtype = kind, stage, dtype
    config.engine.offload_optimizer = name in OFFLOAD and name != "zero3-offload-parameters"
    config.engine.offload_parameters = "offload-parameters" in name or "offload-all" in name
    config.model.layers, config.model.width, config.model.heads = 2, 32, 2
    config.model.init_std, config.model.zero_init_outputs = 0.05, False
    config.stream.global_batch, config.stream.sequence_length = ROWS, LENGTH
    # Smooth: where a ReLU stands at 0, the order of a sum decides a gradient. Small: several chunks per pass.
    config.model.activation, config.model.loss_chunk = "gelu", 50
    config.optim.clip = 0.2
    return config


def new_model(config: Config) -> Decoder:
    model = build_model(config.model, VOCABULARY, LENGTH)
    model.initialize(0)
    return model


SIZES = {name: p.numel() for name, p in new_model(configure("ddp")).named_parameters()}


def batch(step: int) -> dict[str, Tensor]:
    """The global batch of a step: rows weigh differently, so that a mean of the ranks' means is wrong."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    share = torch.linspace(0.1, 0.9, ROWS)[:, None]
    return {
        "tokens": tokens,
        "targets": tokens.roll(-1, 1),
        "document": (torch.arange(LENGTH) // 20).expand(ROWS, LENGTH),
        "position": (torch.arange(LENGTH) % 20).expand(ROWS, LENGTH),
        "cell": torch.full((ROWS, LENGTH), -1),
        "loss_weight": (torch.rand(ROWS, LENGTH, generator=generator) < share).float(),
        "modality": tokens % 3,
    }


def learning_rate(step: int) -> float:
    return 1e-3 * (step + 1)


def train(engine: Engine, world: World, first: int, last: int, accumulation: int = 1) -> list[list[float]]:
    """[loss, gradient norm] of the steps first .. last - 1, as the loop does them."""
    rows = []
    for step in range(first, last):
        inputs = {name: tensor[world.rank :: world.size] for name, tensor in batch(step).items()}
        weight = world.sum(inputs["loss_weight"].sum())
        total = torch.zeros((), dtype=torch.float64)
        for part in range(accumulation):
            sums = engine.forward({name: tensor.chunk(accumulation)[part] for name, tensor in inputs.items()})
            engine.backward(sums.total, weight)
            total += sums.total.detach()
        norm = engine.step(learning_rate(step))
        rows.append([float(world.sum(total) / weight), float("nan") if norm is None else float(norm)])
    return rows


def naive(with_muon: bool) -> list[list[float]]:
    """The same steps in plain torch, on one process, without any of our training code."""
    config = configure("ddp")
    model, o = new_model(config), config.optim
    matrices = list(model.blocks.parameters()) if with_muon else []
    rest = [model.token_embedding.weight, model.position_embedding.weight] if with_muon else model.parameters()
    optimizers = [torch.optim.AdamW(rest, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay)]
    if with_muon:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=o.weight_decay, adjust_lr_fn="match_rms_adamw"))
    rows = []
    for step in range(STEPS):
        inputs = batch(step)
        loss = model(**inputs).total / inputs["loss_weight"].sum()
        model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(step)
            optimizer.step()
        rows.append([loss.item(), norm.item()])
    return rows


def new_engine(name: str, world: World, accumulation: int = 1) -> Engine:
    config = configure(name)
    return build_engine(new_model(config), config, world, accumulation)


def whole_state(engine: Engine, world: World, sizes: dict[str, int] = SIZES) -> State:
    """KIND.NAME -> flat tensor, put together on every rank from what each rank owns; NaN where nobody owns it."""
    state: State = {}
    own = [(f.name, f.start, {kind: t.clone() for kind, t in f.tensors.items()}) for f in engine.owned()]
    for name, start, tensors in sum(world.gather(own), []):
        size = sizes[name]
        for kind, tensor in tensors.items():
            flat = state.setdefault(f"{kind}.{name}", torch.full((size,), float("nan")))
            assert flat[start : start + len(tensor)].isnan().all(), f"{name} is owned twice"
            flat[start : start + len(tensor)] = tensor
    assert not any(flat.isnan().any() for flat in state.values())
    return state


def load(engine: Engine, state: State, updates: int) -> None:
    for f in engine.held():
        for kind, tensor in f.tensors.items():
            tensor.copy_(state[f"{kind}.{f.name}"][f.start : f.start + f.length])
    engine.restored(updates)


def equal(left: State, right: State) -> bool:
    """Bit for bit, the same names included."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def straight_and_resumed(name: str, world: World) -> tuple[dict[str, Any], State]:
    """Six steps at one go; three more in a fresh engine from the state after three; and again in the first engine."""
    engine = new_engine(name, world)
    losses = train(engine, world, 0, HALF)
    state = whole_state(engine, world)
    losses += train(engine, world, HALF, STEPS)
    end = whole_state(engine, world)
    facts: dict[str, Any] = {"losses": losses, "effective": engine.effective()}
    for key, again in (("fresh", new_engine(name, world)), ("rolled_back", engine)):
        load(again, state, HALF)
        loaded = whole_state(again, world)
        later = train(again, world, HALF, STEPS)
        facts[f"{key}_loads_what_was_saved"] = equal(state, loaded)
        facts[f"{key}_goes_on_exactly"] = later == losses[HALF:] and equal(end, whole_state(again, world))
    return facts, state


def continued(name: str, world: World, state: State) -> list[list[float]]:
    engine = new_engine(name, world)
    load(engine, state, HALF)
    return train(engine, world, HALF, STEPS)


def one_step(engine: Engine, world: World, step: int, accumulation: int, factor: float) -> float:
    """One step whose last micro-batch has its loss multiplied by `factor`; returns the norm."""
    inputs = {key: tensor[world.rank :: world.size] for key, tensor in batch(step).items()}
    weight = world.sum(inputs["loss_weight"].sum())
    for part in range(accumulation):
        total = engine.forward({key: tensor.chunk(accumulation)[part] for key, tensor in inputs.items()}).total
        engine.backward(total * (factor if part == accumulation - 1 else 1.0), weight)
    norm = engine.step(1e-3)
    return math.nan if norm is None else float(norm)


def poisoned(name: str, world: World) -> dict[str, bool]:
    """Whether bad gradients leave parameters, moments, and what was to be summed up, as they were."""
    facts = {}
    bad = {"on all ranks": math.nan, "on one rank": math.nan if world.rank else 1.0, "infinite": math.inf}
    for accumulation in (1, 4):
        engine, clean = new_engine(name, world, accumulation), new_engine(name, world, accumulation)
        one_step(engine, world, 0, accumulation, 1.0)
        before = whole_state(engine, world)
        for where, factor in bad.items():
            norm = one_step(engine, world, 1, accumulation, factor)
            unchanged = equal(before, whole_state(engine, world)) and engine.updates() == 1
            facts[f"{where}, {accumulation} micro-batches"] = unchanged and not math.isfinite(norm)
        one_step(engine, world, 2, accumulation, 1.0)
        for step in (0, 2):
            one_step(clean, world, step, accumulation, 1.0)
        facts[f"forgotten, {accumulation} micro-batches"] = equal(whole_state(clean, world), whole_state(engine, world))
        norm = one_step(engine, world, 3, accumulation, 1e10)
        after = whole_state(engine, world)
        facts[f"huge is clipped, {accumulation} micro-batches"] = (
            all(t.isfinite().all() for t in after.values()) and 1e6 < norm < math.inf and engine.updates() == 3
        )
    return facts


def tampered(world: World) -> str:
    """The complaint about a DeepSpeed that turns a setting around."""
    import deepspeed  # noqa: PLC0415

    def initialize(config: dict[str, Any], **others: Any) -> Any:
        changed = config | {"zero_optimization": config["zero_optimization"] | {"overlap_comm": True}}
        return original(config=changed, **others)

    original = deepspeed.initialize
    with mock.patch.object(deepspeed, "initialize", initialize):
        try:
            new_engine("zero2", world)
        except UserError as error:
            return str(error)
    return ""


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    world = start_world()
    facts: dict[str, Any] = {"straight": {}, "accumulated": {}, "continued": {}, "poisoned": {}}
    if world.size == 1:
        state = load_file(out / "state.safetensors")
        facts["continued"] = {name: continued(name, world, state) for name in ("ddp", "zero1", "zero3")}
        facts["naive"], facts["naive_muon"] = naive(False), naive(True)
    else:
        states = {}
        for name in ALL:
            facts["straight"][name], states[name] = straight_and_resumed(name, world)
        for name in FP32:
            facts["accumulated"][name] = train(new_engine(name, world, 2), world, 0, STEPS, 2)
        for name in ("zero1", "zero2", "ddp"):
            facts["continued"][name] = continued(name, world, states["zero3"])
        facts["continued"]["zero3-bf16"] = continued("zero3-bf16", world, states["zero1-bf16"])
        for name in ALL:
            facts["poisoned"][name] = poisoned(name, world)
        facts["tampered"] = tampered(world)
        if world.rank == 0:
            save_file(states["zero3"], out / "state.safetensors")
    if world.rank == 0:
        (out / f"world-{world.size}.json").write_text(json.dumps(facts))
    world.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

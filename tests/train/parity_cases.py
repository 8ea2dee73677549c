"""The same 20 steps by every engine, for test_parity.py.

    python parity_cases.py OUT

Importing torch and DeepSpeed is slow, so one process does it, and forks into 4, then 2, 1 and 4 ranks. Each run leaves
its final weights as OUT/NAME.safetensors, and all leave losses and norms in OUT/rows-LEG.json.
"""

import json
import logging
import math
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmtrain.config import Config
from mmtrain.train.distributed import World, start_world
from mmtrain.train.engine import Engine, build_engine
from mmtrain.train.launch import free_port
from mmtrain.train.loop import seed_dropout
from tests.train import engine_cases
from tests.train.engine_cases import FP32, OFFLOAD, VOCABULARY, State, load, new_model, whole_state

ROWS, LENGTH, STEPS, SHORT = 16, 32, 20, 5
RATE = 2e-3
CLIP = 0.815  # between the gradient norms, so that some steps are clipped
# AdamW divides by sqrt(v) + epsilon: with 1e-8, elements with next to no gradient are rounding errors made large.
EPSILON = 1e-6
FP32_ENGINES = (*FP32, *(name for name in OFFLOAD if "bf16" not in name))
BF16_ENGINES = (*engine_cases.BF16, *(name for name in OFFLOAD if "bf16" in name))
RECOMPUTING = (("ddp", 0.1), ("zero1", 0.0), ("zero3", 0.1), ("zero3-offload-parameters", 0.0))  # engine, dropout
JOURNEY = (("zero3", 4), ("zero1", 2), ("zero0", 1), ("zero3", 4))  # engine and ranks, five steps each
Rows = list[list[float]]


@dataclass(frozen=True)
class Case:
    """A run of an engine; its name says all of it."""

    engine: str
    ranks: int
    accumulation: int = 1
    dropout: float = 0.0
    recomputes: bool = False
    bf16_reduction: bool = False

    @property
    def name(self) -> str:
        """Names its files."""
        extras = f"-dropout-{self.dropout}" * (self.dropout > 0) + "-recomputed" * self.recomputes
        extras += "-bf16-reduction" * self.bf16_reduction
        return f"{self.engine}-ranks-{self.ranks}-parts-{self.accumulation}{extras}"

    @property
    def steps(self) -> int:
        """Of training: a few where two runs are compared bit for bit."""
        return SHORT if self in recomputing_cases() else STEPS


def cases(ranks: int) -> list[Case]:
    """All runs on so many ranks."""
    parts = (4,) if ranks == 4 else (1, 4)
    runs = [Case(engine, ranks, part) for engine in FP32_ENGINES for part in parts]
    if ranks == 2:
        runs += [Case(engine, ranks, 4) for engine in BF16_ENGINES]
        runs += [Case(f"zero{stage}-bf16", ranks, 4, bf16_reduction=True) for stage in (1, 2, 3)]
        runs += recomputing_cases()
    return runs


def recomputing_cases() -> list[Case]:
    """Engines with and without recomputed activations."""
    return [Case(engine, 2, 2, dropout, recomputes) for engine, dropout in RECOMPUTING for recomputes in (False, True)]


def configure(case: Case) -> Config:
    config = engine_cases.configure(case.engine)
    config.model.family = "llama"  # has vectors beside matrices: two groups of parameters
    config.stream.global_batch, config.stream.sequence_length = ROWS, LENGTH
    config.model.dropout, config.model.activation_checkpointing = case.dropout, case.recomputes
    config.optim.clip, config.optim.eps = CLIP, EPSILON
    config.engine.reduce_dtype = "bf16" if case.bf16_reduction else "fp32"
    return config


SIZES = {name: p.numel() for name, p in new_model(configure(Case("ddp", 1))).named_parameters()}


def batch(step: int) -> dict[str, Tensor]:
    """Rows packed with text and pictures, 0 to 28 of 32 places full: ranks and micro-batches weigh differently."""
    generator = torch.Generator().manual_seed(step)
    place, row = torch.arange(LENGTH), torch.arange(ROWS)[:, None]
    full = place < (7 * row + 3 * step) % 29
    number = place // 9
    is_picture = ((number + row) % 2 == 1) & full
    tokens = torch.randint(1, VOCABULARY // 2, (ROWS, LENGTH), generator=generator) + VOCABULARY // 2 * is_picture
    targets = tokens.roll(-1, 1)
    return {
        "tokens": tokens * full,
        "targets": targets * full,
        "document": torch.where(full, number, -1),
        "position": (place % 9).expand(ROWS, LENGTH),
        "cell": torch.full((ROWS, LENGTH), -1),
        "loss_weight": torch.where(is_picture, 0.7, 1.0) * full,
        "modality": torch.where(is_picture, 2, 1) * full,
    }


def train(engine: Engine, case: Case, world: World, first: int, last: int) -> Rows:
    """[loss, gradient norm] of the steps first .. last - 1, as the loop does them."""
    rows = []
    for step in range(first, last):
        inputs = {name: tensor[world.rank :: world.size] for name, tensor in batch(step).items()}
        weight = world.sum(inputs["loss_weight"].sum())
        total = torch.zeros((), dtype=torch.float64)
        for part in range(case.accumulation):
            if case.dropout:
                seed_dropout(0, step, world.rank, part)
            sums = engine.forward({name: tensor.chunk(case.accumulation)[part] for name, tensor in inputs.items()})
            engine.backward(sums.total, weight)
            total += sums.total.detach()
        norm = engine.step(RATE)
        rows.append([float(world.sum(total) / weight), math.nan if norm is None else float(norm)])
    return rows


def start(case: Case, world: World) -> Engine:
    config = configure(case)
    return build_engine(new_model(config), config, world, case.accumulation)


def weights(state: State) -> State:
    return {name.removeprefix("parameter."): t for name, t in state.items() if name.startswith("parameter.")}


def plain() -> tuple[Rows, State]:
    """The same steps in plain torch, on one process, without any of our training code."""
    config = configure(Case("ddp", 1))
    model, o = new_model(config), config.optim
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], RATE, (o.beta1, o.beta2), o.eps)
    rows = []
    for step in range(STEPS):
        inputs = batch(step)
        loss = model(**inputs).total / inputs["loss_weight"].sum()
        model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
        optimizer.step()
        rows.append([loss.item(), norm.item()])
    return rows, {name: p.detach().flatten() for name, p in model.named_parameters()}


def travel(leg: int, out: Path, world: World) -> Rows:
    """Five steps of the journey, from the state that the leg before has left."""
    case = Case(*JOURNEY[leg], accumulation=2)
    engine = start(case, world)
    if leg:
        load(engine, load_file(out / f"leg-{leg - 1}.safetensors"), leg * SHORT)
    rows = train(engine, case, world, leg * SHORT, (leg + 1) * SHORT)
    state = whole_state(engine, world, SIZES)
    if world.rank == 0:
        save_file(state, out / f"leg-{leg}.safetensors")
    return rows


def work(rank: int, leg: int, ports: list[int], out: Path) -> None:
    """What a rank does on one leg of the journey."""
    ranks = JOURNEY[leg][1]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": str(ports[leg])}
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's, at every step
    world = start_world()
    rows = {f"leg-{leg}": travel(leg, out, world)}
    for case in cases(ranks) if leg < 3 else []:
        engine = start(case, world)
        rows[case.name] = train(engine, case, world, 0, case.steps)
        final = weights(whole_state(engine, world, SIZES))
        if rank == 0:
            save_file(final, out / f"{case.name}.safetensors")
    if ranks == 1:
        rows["plain"], final = plain()
        save_file(final, out / "plain.safetensors")
    if rank == 0:
        (out / f"rows-{leg}.json").write_text(json.dumps(rows))
    world.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    import deepspeed  # noqa: F401, PLC0415  (before the forks)

    ports = [free_port() for _ in JOURNEY]
    for leg, (_, ranks) in enumerate(JOURNEY):
        arguments = (leg, ports, Path(sys.argv[1]))
        torch.multiprocessing.start_processes(work, arguments, nprocs=ranks, start_method="fork")


if __name__ == "__main__":
    main()

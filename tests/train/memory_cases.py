"""The most memory that tensors really take in training, counted from every allocation that torch reports.

torchrun --nproc_per_node 2 memory_cases.py OUT [LAYERS WIDTH]

writes, of DeepSpeed, as JSON: {"memory": {stage dtype: [measured, estimated]}, "sent": the same in bytes that a rank
sends in a step}
"""

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtrain.config import Config, ModelConfig
from mmtrain.models import build_model, count_parameters
from mmtrain.train.communication import traffic
from mmtrain.train.distributed import World, start_world
from mmtrain.train.engine import build_engine
from mmtrain.train.memory import estimate
from tests.train.communication_cases import BYTES, count_collectives, reusing_within, sent

VOCABULARY = 4096
TIMES = 2  # collectives' threads and the garbage collector free some tensors late, now and then: the least counts
STAGES = [(0, "fp32")] + [(stage, dtype) for stage in (1, 2, 3) for dtype in ("fp32", "bf16")]


def configure(stage: int | None, dtype: str, rows: int, length: int, world_size: int, **model: Any) -> Config:
    """A model of 6 M parameters; two micro-batches per step."""
    config = Config()
    config.model = ModelConfig(**({"layers": 6, "width": 256, "heads": 4, "attention": "sdpa"} | model))
    config.stream.sequence_length, config.stream.global_batch = length, 2 * rows * world_size
    config.engine.kind, config.engine.dtype = "ddp" if stage is None else "deepspeed", dtype
    config.engine.stage, config.engine.micro_batch = stage or 0, rows
    return config


def batch(rows: int, length: int, device: str = "cpu") -> dict[str, Tensor]:
    tokens = torch.randint(0, VOCABULARY, (rows, length), device=device)
    zeros = torch.zeros(rows, length, dtype=torch.int32, device=device)
    fields = {"tokens": tokens, "targets": tokens.roll(-1, 1), "modality": tokens % 3}
    fields |= {"document": zeros, "cell": zeros - 1, "position": zeros + torch.arange(length, device=device)}
    return fields | {"loss_weight": torch.ones(rows, length, device=device)}


def train(config: Config, world: World, steps: int = 2, before_last: Callable[[], object] = int) -> None:
    """Steps from nothing; `before_last` is called before the last of them."""
    rows, length = config.engine.micro_batch, config.stream.sequence_length
    model = build_model(config.model, VOCABULARY, length)
    model.initialize(0)
    engine = build_engine(model.to(world.device), config, world, 2)
    for step in range(steps):
        if step == steps - 1:
            before_last()
        inputs = batch(2 * rows, length, world.device.type)
        for part in range(2):
            sums = engine.forward({name: tensor.chunk(2)[part] for name, tensor in inputs.items()})
            engine.backward(sums.total, inputs["loss_weight"].sum())
            del sums
        engine.step(1e-3)


def measured(config: Config, world: World) -> int:
    """Bytes of CPU tensors at the peak of `train`."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train(config, world, before_last=BYTES.clear)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    present = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        present += event.nbytes()
        peak = max(peak, present)
    return peak


def main(out: Path, layers: int = 6, width: int = 256) -> None:
    count_collectives()
    world = start_world()
    memory: dict[str, list[int]] = {}
    sums: dict[str, list[int]] = {}
    shape = {"fp32": (4, 256), "bf16": (2, 128)}  # bf16 is slow where the processor emulates it
    for stage, dtype in STAGES * TIMES:
        rows, length = shape[dtype]
        config = configure(stage, dtype, rows, length, world.size, layers=layers, width=width)
        expected = estimate(config, VOCABULARY, length, world.size, stage, device="cpu").device_total
        name, peak = f"{stage} {dtype}", measured(config, world)
        memory[name] = [min(peak, memory.get(name, [peak])[0]), expected]
        sums[name] = [sent(world.size), traffic(config, VOCABULARY, length, world.size, stage).total]
    # As a model of billions of parameters would: a part of it is still there on the way back.
    for checkpointing in (False, True):
        sizes = {"layers": layers, "width": width, "activation_checkpointing": checkpointing}
        config = configure(3, "bf16", *shape["bf16"], world.size, **sizes)
        length = shape["bf16"][1]
        within = count_parameters(config.model, VOCABULARY, length) // 4
        with reusing_within(within):
            train(config, world, before_last=BYTES.clear)
        name = "3 bf16, large" + (", checkpointing" if checkpointing else "")
        sums[name] = [sent(world.size), traffic(config, VOCABULARY, length, world.size, 3, within).total]
    if world.rank == 0:
        out.write_text(json.dumps({"memory": memory, "sent": sums}))
    # Threads of the group that live on while Python ends may abort the process.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))

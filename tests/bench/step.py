"""Speed of a training step with mmtrain's own model, engine and FLOP counts.

    python tests/bench/step.py --model cm3leon_350m --sequence-length 4096 --batch 8 --engine zero1
    torchrun --nproc_per_node 8 tests/bench/step.py --model cm3leon_7b --engine zero3 --checkpointing

Rows are full: each holds documents of --document-length tokens of random ids. Prints tokens/s, MFU (causal and
PaLM), HFU and peak memory. On CUDA the peak rate is the published one; on a CPU it is measured, and said so.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from mmtrain.config import Config, UserError
from mmtrain.config.compose import compose
from mmtrain.flops import StepFlops, measured_matmul_rate, peak_flops, step_flops
from mmtrain.models import build_model, count_parameters
from mmtrain.train.distributed import World, start_world
from mmtrain.train.engine import build_engine
from mmtrain.train.launch import check_batch, free_port
from mmtrain.train.run import environment


@dataclass(frozen=True)
class Measured:
    """Seconds of each step on this rank, last loss, and bytes."""

    seconds: list[float]
    loss: float
    peak_memory: int


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cm3leon_350m", help="one of `mmtrain ls model`")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--document-length", type=int, default=0, help="tokens per document (0: the whole row)")
    parser.add_argument("--batch", type=int, default=8, help="rows per step, over all ranks")
    parser.add_argument("--micro-batch", type=int, default=0, help="rows per rank and forward pass (0: all)")
    parser.add_argument("--vocabulary", type=int, default=66_048)
    parser.add_argument("--engine", default="zero1", choices=("ddp", "zero0", "zero1", "zero2", "zero3"))
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the result here as well")
    return parser.parse_args()


def configure(args: argparse.Namespace, world: World) -> Config:
    """The run's configuration, checked like that of `mmtrain train`."""
    config = compose([f"model={args.model}", f"engine={args.engine}", f"engine.dtype={args.dtype}"])
    config.model.activation_checkpointing = args.checkpointing
    config.stream.sequence_length, config.stream.global_batch = args.sequence_length, args.batch
    config.engine.micro_batch = args.micro_batch
    check_batch(config, world.size)
    return config


def random_batch(args: argparse.Namespace, world: World) -> dict[str, torch.Tensor]:
    """This rank's rows: full of documents, every target counted."""
    rows, length = args.batch // world.size, args.sequence_length
    generator = torch.Generator().manual_seed(world.rank)
    tokens = torch.randint(0, args.vocabulary, (rows, length), generator=generator)
    column = torch.arange(length)
    document_length = args.document_length or length
    fields = {
        "tokens": tokens,
        "targets": tokens.roll(-1, 1),
        "document": (column // document_length).int().repeat(rows, 1),
        "position": (column % document_length).int().repeat(rows, 1),
        "cell": torch.full((rows, length), -1, dtype=torch.int32),
        "loss_weight": torch.ones(rows, length),
        "modality": tokens % 3,
    }
    return {name: tensor.to(world.device) for name, tensor in fields.items()}


def measure(args: argparse.Namespace, config: Config, world: World) -> Measured:
    """Train on one batch again and again, timing each step to its end on the device."""
    on_gpu = world.device.type == "cuda"
    model = build_model(config.model, args.vocabulary, args.sequence_length)
    model.initialize(0)
    accumulation = args.batch // world.size // args.micro_batch if args.micro_batch else 1
    engine = build_engine(model.to(world.device), config, world, accumulation)
    inputs = random_batch(args, world)
    parts = {name: tensor.chunk(accumulation) for name, tensor in inputs.items()}
    weight = world.sum(inputs["loss_weight"].sum())
    seconds, loss = [], float("nan")
    for step in range(args.warmup + args.steps):
        if step == args.warmup and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        world.barrier()
        start = time.perf_counter()
        for part in range(accumulation):
            sums = engine.forward({name: tensors[part] for name, tensors in parts.items()})
            engine.backward(sums.total, weight)
        engine.step(1e-4)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        loss = float(sums.total.detach() / weight) * world.size * accumulation
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_memory = torch.cuda.max_memory_allocated() if on_gpu else resident
    return Measured(seconds[args.warmup :], loss, peak_memory)


def flops(args: argparse.Namespace, config: Config, world: World) -> StepFlops:
    """Of one step of all ranks."""
    document_length = args.document_length or args.sequence_length
    full, rest = divmod(args.sequence_length, document_length)
    lengths = ([document_length] * full + ([rest] if rest else [])) * args.batch
    return step_flops(config.model, args.vocabulary, lengths, args.batch, args.sequence_length)


def peak_rate(config: Config, world: World) -> tuple[float | None, str]:
    """FLOP/s of all devices, and what that number is."""
    dtype = torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32
    if world.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(world.device), dtype)
        return (peak * world.size, "published dense peak") if peak else (None, "unknown: no utilization")
    rate = float(world.sum(torch.tensor(measured_matmul_rate(dtype), dtype=torch.float64)))
    return rate, "measured here with matrix products of 1024 x 1024, no published peak"


def main() -> int:
    args = arguments()
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    world = start_world()
    try:
        config = configure(args, world)
        rate, meaning = peak_rate(config, world)
        measured = measure(args, config, world)
        if world.rank == 0:
            report(args, config, world, measured, rate, meaning)
    except UserError as error:
        print(f"step.py: {error}", file=sys.stderr)
        return 2
    finally:
        torch.distributed.destroy_process_group()
    return 0


def report(
    args: argparse.Namespace, config: Config, world: World, measured: Measured, rate: float | None, meaning: str
) -> None:
    """Print the table, and write it as JSON where asked."""
    on_gpu = world.device.type == "cuda"
    median = sorted(measured.seconds)[len(measured.seconds) // 2]
    work, processor = flops(args, config, world), environment()["processor"]
    share = {name: count / median / rate if rate else None for name, count in dataclasses.asdict(work).items()}
    result = {
        "device": torch.cuda.get_device_name() if on_gpu else processor,
        "threads": torch.get_num_threads(),
        "ranks": world.size,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}
        | {"python": platform.python_version(), "cuda": torch.version.cuda},
        "settings": {key: str(value) for key, value in vars(args).items() if key != "json"},
        "parameters": count_parameters(config.model, args.vocabulary, args.sequence_length),
        "step_seconds_median": median,
        "step_seconds_fastest": min(measured.seconds),
        "step_seconds_slowest": max(measured.seconds),
        "tokens_per_second": args.batch * args.sequence_length / median,
        "peak_flops": rate,
        "peak_flops_is": meaning,
        "mfu_causal": share["model_causal"],
        "mfu_palm": share["model_palm"],
        "hfu": share["hardware"],
        "peak_memory_gib": measured.peak_memory / 2**30,
        "peak_memory_is": "allocated by torch on rank 0's GPU" if on_gpu else "resident memory of rank 0's process",
        "loss": measured.loss,
    }
    for name, value in result.items():
        print(f"{name:<22}{format_value(name, value)}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


def format_value(name: str, value: object) -> str:
    """A value for people."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, float):
        if name in ("mfu_causal", "mfu_palm", "hfu"):
            return f"{100 * value:.1f} %"
        return f"{value:.3g}" if value > 1e6 else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    sys.exit(main())

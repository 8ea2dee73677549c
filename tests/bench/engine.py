"""Overhead of the engines against a plain torch loop on the same model, in alternation, one process.

    OMP_NUM_THREADS=1 python tests/bench/engine.py --engines zero1 ddp --rounds 15 --profile

20 M parameters. The plain loop has its own AdamW, the same clipping and the same batch; in bf16 it keeps float32
masters beside bf16 parameters, as ZeRO does (engine=ddp casts at each product instead). Prints medians by section, of
processor time and of the clock: on a busy machine only the first says something.
"""

import argparse
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from mmtrain.config import Config, ModelConfig
from mmtrain.models import Decoder, build_model, count_parameters
from mmtrain.train.distributed import World, start_world
from mmtrain.train.engine import build_engine
from mmtrain.train.launch import free_port
from mmtrain.train.optimizers import parameter_groups

VOCABULARY, RATE = 8192, 1e-3
SECTIONS = ("forward", "backward", "step")
Sections = dict[str, Callable[[], object]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["zero1", "ddp", "zero0", "zero2", "zero3"])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--profile", action="store_true", help="also the operations in which the two differ most")
    return parser.parse_args()


def configure(args: argparse.Namespace, engine: str, dtype: str) -> Config:
    config = Config()
    config.engine.kind, config.engine.dtype = ("ddp" if engine == "ddp" else "deepspeed"), dtype
    config.engine.stage = 0 if engine == "ddp" else int(engine.removeprefix("zero"))
    config.model = ModelConfig(layers=4, width=512, heads=8, zero_init_outputs=False)
    config.stream.global_batch, config.stream.sequence_length = args.rows, args.sequence_length
    return config


def new_model(config: Config) -> Decoder:
    model = build_model(config.model, VOCABULARY, config.stream.sequence_length)
    model.initialize(0)
    return model


def random_batch(args: argparse.Namespace) -> dict[str, Tensor]:
    shape = (args.rows, args.sequence_length)
    tokens = torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    return {
        "tokens": tokens,
        "targets": tokens.roll(-1, 1),
        "document": torch.zeros(shape, dtype=torch.int64),
        "position": torch.arange(shape[1]).expand(shape),
        "cell": torch.full(shape, -1),
        "loss_weight": torch.ones(shape),
        "modality": tokens % 3,
    }


def plain_loop(config: Config, inputs: dict[str, Tensor]) -> Sections:
    """The sections of a step as one writes them in torch alone."""
    model, o = new_model(config), config.optim
    in_bf16 = config.engine.dtype == "bf16"
    weight, total = inputs["loss_weight"].sum(), [torch.zeros(())]
    masters = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()] if in_bf16 else [*model.parameters()]
    model = model.bfloat16() if in_bf16 else model
    groups = parameter_groups(masters, o.weight_decay)
    optimizer = torch.optim.AdamW(groups, RATE, (o.beta1, o.beta2), o.eps, fused=True)

    def forward() -> None:
        total[0] = model(**inputs).total

    def backward() -> None:
        (total[0] / weight).backward()

    def step() -> None:
        for parameter, master in zip(model.parameters(), masters, strict=True) if in_bf16 else ():
            master.grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(masters, o.clip)
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(model.parameters(), masters, strict=True) if in_bf16 else ():
                parameter.copy_(master)
        model.zero_grad(set_to_none=True)

    return {"forward": forward, "backward": backward, "step": step}


def engine_loop(config: Config, inputs: dict[str, Tensor], world: World) -> Sections:
    """The sections of a step as the loop calls them."""
    engine = build_engine(new_model(config), config, world, 1)
    weight, total = inputs["loss_weight"].sum(), [torch.zeros(())]

    def forward() -> None:
        total[0] = engine.forward(inputs).total

    return {
        "forward": forward,
        "backward": lambda: engine.backward(total[0], weight),
        "step": lambda: engine.step(RATE),
    }


def measure(args: argparse.Namespace, engine: str, dtype: str) -> None:
    """Alternate plain loop and engine step by step, and print the medians."""
    config = configure(args, engine, dtype)
    inputs = random_batch(args)
    loops = {"plain": plain_loop(config, inputs), "engine": engine_loop(config, inputs, start_world())}
    times: dict[str, dict[str, tuple[list[float], list[float]]]]
    times = {kind: {name: ([], []) for name in SECTIONS} for kind in loops}
    for number in range(args.rounds + 2):
        order = list(loops)[:: 1 if number % 2 else -1]
        for kind in order:
            for name in SECTIONS:
                clock, processor = time.perf_counter(), time.process_time()
                loops[kind][name]()
                if number >= 2:  # the first steps make the optimizer's state and learn the order of the parameters
                    times[kind][name][0].append(time.process_time() - processor)
                    times[kind][name][1].append(time.perf_counter() - clock)
    parameters = count_parameters(config.model, VOCABULARY, args.sequence_length)
    print(f"{engine} {dtype}, {parameters / 1e6:.1f} M parameters, {args.rows} x {args.sequence_length} tokens")
    print(f"  {'':<10}{'plain ms':>10}{'engine ms':>10}{'ratio':>8}   by the clock")
    sums = {
        kind: [[sum(x) for x in zip(*(sections[n][i] for n in SECTIONS), strict=True)] for i in (0, 1)]
        for kind, sections in times.items()
    }
    for name in (*SECTIONS, "all"):
        both = [[statistics.median(sums[k][i] if name == "all" else times[k][name][i]) for k in loops] for i in (0, 1)]
        (plain, ours), (plain_clock, ours_clock) = both
        row = f"{1e3 * plain:>10.1f}{1e3 * ours:>10.1f}{ours / plain:>8.3f}{ours_clock / plain_clock:>10.3f}"
        print(f"  {name:<10}{row}")
    pairs = [ours / plain for plain, ours in zip(sums["plain"][0], sums["engine"][0], strict=True)]
    print(f"  median of the ratios of neighbouring steps: {statistics.median(pairs):.3f}")
    if args.profile:
        print_profile(loops)


def print_profile(loops: dict[str, Sections], steps: int = 3) -> None:
    """Operations by the difference of their own time per step."""
    own: dict[str, dict[str, float]] = {}
    for kind, sections in loops.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(steps):
                for name in SECTIONS:
                    sections[name]()
        own[kind] = {e.key: e.self_cpu_time_total / 1e3 / steps for e in profile.key_averages()}
    names = sorted(own["plain"] | own["engine"], key=lambda n: own["plain"].get(n, 0) - own["engine"].get(n, 0))
    for name in names[:8] + names[-4:]:
        plain, ours = (own[kind].get(name, 0.0) for kind in ("plain", "engine"))
        print(f"    {name[:52]:<54}{plain:>9.1f}{ours:>9.1f}{ours - plain:>+9.1f} ms")


def main() -> None:
    args = arguments()
    pairs = [(engine, dtype) for dtype in args.dtypes for engine in args.engines]
    pairs = [pair for pair in pairs if pair != ("zero0", "bf16")]  # refused
    if len(pairs) > 1:  # DeepSpeed leaves its hooks in a process: each pair has its own
        own = ["--rounds", str(args.rounds), "--rows", str(args.rows), "--sequence-length", str(args.sequence_length)]
        for engine, dtype in pairs:
            command = [sys.executable, __file__, "--engines", engine, "--dtypes", dtype, *own]
            subprocess.run(command + ["--profile"] * args.profile, check=True)
        return
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    measure(args, *pairs[0])
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

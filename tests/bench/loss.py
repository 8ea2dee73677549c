"""Peak memory and time of the output head with its loss and gradients: in chunks, against plain torch.

    python tests/bench/loss.py --chunks 256 1024 4096 --widths 1024 256 --dtype fp32

Plain: `cross_entropy(linear(x, W).float())` and backward, what a model without chunks does. Times (on CPU the
processor's, over all threads): all variants in turn, several rounds in one process; the ratio is the median over
rounds. Memory: the peak over what was there before the step (x and W), on CPU the resident memory of a fresh process
each, on CUDA what torch allocated.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from mmtrain.models.loss import linear_cross_entropy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PLAIN = 0  # in place of a chunk
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On CPU the processor's time over all threads, so that other work on the machine changes it little.
CLOCK = time.perf_counter if DEVICE == "cuda" else time.process_time


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=66_048)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 256])
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)  # a chunk; what the fresh process is told
    return parser.parse_args()


def inputs(args: argparse.Namespace, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W, targets and weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.tokens, width, generator=generator)
    weight = torch.randn(args.vocabulary, width, generator=generator) * width**-0.5
    targets = torch.randint(0, args.vocabulary, (args.tokens,), generator=generator)
    leaves = [t.to(DEVICE, DTYPES[args.dtype]).requires_grad_() for t in (x, weight)]
    return leaves[0], leaves[1], targets.to(DEVICE), torch.ones(args.tokens, device=DEVICE)


def step(chunk: int, x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> None:
    """Loss and gradients, to their end on the device."""
    x.grad = weight.grad = None
    if chunk == PLAIN:
        total = (F.cross_entropy(F.linear(x, weight).float(), targets, reduction="none") * weights).sum()
    else:
        total, _ = linear_cross_entropy(x, weight, targets, weights, chunk)
    (total / len(targets)).backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def resident(key: str) -> int:
    """VmRSS or VmHWM, the peak, of this process in bytes (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def peak_bytes(args: argparse.Namespace, width: int, chunk: int) -> int:
    """Of one step, over what x and W take."""
    given = inputs(args, width)
    if DEVICE == "cuda":
        step(chunk, *given)  # cuBLAS takes its workspace once
        given[0].grad = given[1].grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(chunk, *given)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    step(chunk, *given)
    return resident("VmHWM") - before


def peak_in_fresh_process(args: argparse.Namespace, width: int, chunk: int) -> int:
    settings = ["--vocabulary", args.vocabulary, "--tokens", args.tokens, "--widths", width, "--dtype", args.dtype]
    command = [sys.executable, __file__, *settings, "--memory-of", chunk]
    return json.loads(subprocess.run(map(str, command), check=True, capture_output=True, text=True).stdout)


def seconds(args: argparse.Namespace, width: int) -> dict[int, list[float]]:
    """By chunk, those of each round, after one that does not count."""
    given = inputs(args, width)
    found: dict[int, list[float]] = {chunk: [] for chunk in (PLAIN, *args.chunks)}
    for turn in range(args.rounds + 1):
        for chunk, times in found.items():
            start = CLOCK()
            step(chunk, *given)
            if turn:
                times.append(CLOCK() - start)
    return found


def main() -> None:
    args = arguments()
    if args.memory_of is not None:
        print(peak_bytes(args, args.widths[0], args.memory_of))
        return
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, {args.tokens} tokens, vocabulary {args.vocabulary}, {args.dtype}")
    print("| width | chunk | peak memory | of plain | step (median) | of plain |\n|---|---|---|---|---|---|")
    for width in args.widths:
        peaks = {chunk: peak_in_fresh_process(args, width, chunk) for chunk in (PLAIN, *args.chunks)}
        times = seconds(args, width)
        for chunk, peak in peaks.items():
            ratio = statistics.median(t / plain for t, plain in zip(times[chunk], times[PLAIN], strict=True))
            print(
                f"| {width} | {chunk or 'plain'} | {peak / 2**20:,.0f} MiB | {peak / peaks[PLAIN]:.3f} "
                f"| {statistics.median(times[chunk]):.2f} s | {ratio:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

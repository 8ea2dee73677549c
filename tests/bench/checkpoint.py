"""Stall and total time of a checkpoint, written behind the training and not, against a plain write of the same bytes.

    OMP_NUM_THREADS=1 python tests/bench/checkpoint.py --parameters 100e6 --folder /scratch/bench

One rank, float32 parameters and AdamW's two moments: 12 bytes per parameter. Stall: how long `save` takes; total: until
the checkpoint is complete. Plain: the same number of bytes from memory into one file, flushed, as dd conv=fsync does,
with the SHA-256 and without; library: safetensors.save_file, which neither hashes nor flushes, then both. Variants
take turns, several rounds; the figures are medians.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from mmtrain.train.checkpoint import file_fault
from mmtrain.train.distributed import World
from mmtrain.train.fragments import PARAMETER, whole
from mmtrain.train.saving import Saver, write_durably

KINDS = (PARAMETER, "exp_avg", "exp_avg_sq")
Times = tuple[float, float]  # stall and total in seconds
ALONE = World(0, 1, torch.device("cpu"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=100e6)
    parser.add_argument("--tensors", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: that of temporary files")
    return parser.parse_args()


class Bench:
    """The state and the ways of writing it."""

    def __init__(self, folder: Path, num_parameters: int, num_tensors: int):
        self.folder, size = folder, num_parameters // num_tensors
        names = [f"blocks.{i}.weight" for i in range(num_tensors)]
        self.states = {name: {kind: torch.randn(size) for kind in KINDS} for name in names}
        self.shapes = {name: [size] for name in names}
        self.tensors: dict[str, Tensor] = {f"{k}.{n}": t for n, ts in self.states.items() for k, t in ts.items()}
        self.num_bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        self.behind = Saver(folder / "behind", ALONE, keep=1)
        self.at_once = Saver(folder / "at-once", ALONE, keep=1, asynchronous=False)
        self.step = 0

    def save(self, saver: Saver) -> Times:
        self.step += 1
        started = time.perf_counter()
        saver.save(whole(self.states), self.shapes, {"step": self.step})
        stall = time.perf_counter() - started
        assert saver.wait() is None
        return stall, time.perf_counter() - started

    def plain(self, hashed: bool) -> Times:
        started = time.perf_counter()
        path = self.folder / "plain"
        if hashed:
            write_durably(path, (tensor.numpy() for tensor in self.tensors.values()))
        else:
            with open(path, "wb") as file:
                for tensor in self.tensors.values():
                    file.write(tensor.numpy())
                file.flush()
                os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        path.unlink()
        return seconds, seconds

    def library(self) -> Times:
        started = time.perf_counter()
        path = self.folder / "library"
        save_file(self.tensors, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            hashlib.file_digest(file, "sha256")
        seconds = time.perf_counter() - started
        path.unlink()
        return seconds, seconds

    def verify(self) -> Times:
        newest = self.folder / "behind" / f"step-{self.step:08d}"
        (name,) = [path.name for path in newest.glob("tensors-*")]
        started = time.perf_counter()
        assert file_fault(newest, name, {"bytes": (newest / name).stat().st_size, "sha256": ""})
        seconds = time.perf_counter() - started
        return seconds, seconds


def main() -> None:
    args = arguments()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        bench = Bench(folder, int(args.parameters), args.tensors)
        variants: dict[str, Callable[[], Times]] = {
            "plain write": lambda: bench.plain(False),
            "plain write and SHA-256": lambda: bench.plain(True),
            "safetensors.save_file, then SHA-256": bench.library,
            "checkpoint, training waits": lambda: bench.save(bench.at_once),
            "checkpoint behind training": lambda: bench.save(bench.behind),
            "hash a file of it (verify)": bench.verify,
        }
        found: dict[str, list[Times]] = {name: [] for name in variants}
        for turn in range(args.rounds + 1):
            for name, variant in variants.items():
                times = variant()
                if turn:  # the first round takes the memory of the copy
                    found[name].append(times)
        print(f"{bench.num_bytes / 1e9:.2f} GB of state, torch {torch.__version__}")
        print("| | stall | total | GB/s | total, of plain |\n|---|---|---|---|---|")
        for name, rows in found.items():
            stall, total = (statistics.median(times[i] for times in rows) for i in (0, 1))
            ratio = statistics.median(t / p for (_, t), (_, p) in zip(rows, found["plain write"], strict=True))
            print(f"| {name} | {stall:.2f} s | {total:.2f} s | {bench.num_bytes / 1e9 / total:.2f} | {ratio:.2f} |")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

"""Start, resume and state of the stream on a billion documents in a hundred thousand shards.

    python tests/bench/scale.py [--shards 100000] [--documents 10000]

The manifest is real and has an entry for every shard; all shards are the same file on disk under different names, so
that no terabytes are needed. Measured, in a process of its own: opening the data set and building the stream, the first
batch, going on from a checkpoint at step 1,000,000, and the size of the state. Then a local folder in which every shard
and index is a file of its own (sparse, so that it takes no space) is opened.
"""

import argparse
import dataclasses
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from mmtrain.config import ObjectiveConfig, StreamConfig
from mmtrain.shards import TokenShards
from mmtrain.shards.manifest import MANIFEST, VOCABULARY, Manifest, index_name, shard_name
from mmtrain.shards.store import File, Store
from mmtrain.stream import Source, Stream
from tests.bench.stream import make_tokens

FAR_STEP = 1_000_000


class OneShard(Store):
    """Every shard of a data set is the same file."""

    def __init__(self, template: Path, manifest: Path) -> None:
        super().__init__(str(manifest.parent))
        self._template, self._manifest = template, manifest

    def fetch(self, name: str, num_bytes: int | None = None, sha256: str | None = None) -> Path:
        if name == MANIFEST:
            return self._manifest
        if name == VOCABULARY:
            return self._template / VOCABULARY
        return self._template / (index_name(shard_name(0)) if name.endswith(".npz") else shard_name(0))

    def open(self, name: str, num_bytes: int | None = None, sha256: str | None = None) -> BinaryIO:
        return open(self.fetch(name), "rb")

    def prefetch(self, files: Iterable[File]) -> None:
        """Nothing is far away."""


def write_manifest(template: Path, num_shards: int, path: Path) -> None:
    """The manifest of `num_shards` shards like the one of `template`."""
    one = Manifest.load(template)
    shards = tuple(dataclasses.replace(one.shards[0], name=shard_name(i)) for i in range(num_shards))
    whole = dataclasses.replace(one, shards=shards, documents=one.documents * num_shards)
    path.write_text(json.dumps(dataclasses.asdict(whole)))


def memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(template: Path, manifest: Path) -> None:
    before = memory_mb()
    started = time.perf_counter()
    shards = TokenShards(str(manifest.parent), store=OneShard(template, manifest))
    config = StreamConfig(sequence_length=4096, global_batch=256, lanes=256, shuffle_shards=64)
    stream = Stream([Source("corpus", shards)], shards.vocabulary, config, ObjectiveConfig(), None, seed=0)
    opened = time.perf_counter() - started
    print(f"{len(shards):,} documents in {len(shards.manifest.shards):,} shards")
    print(f"opened, stream built: {opened:.2f} s, peak of the process {memory_mb():.0f} MB ({before:.0f} before)")
    started = time.perf_counter()
    stream.batch(0)
    elapsed = time.perf_counter() - started
    print(f"first batch ({config.global_batch} rows of {config.sequence_length}, one process): {elapsed:.2f} s")
    state = stream.state()
    print(f"state: {len(json.dumps(state)):,} bytes for {config.lanes} lanes")

    # A checkpoint of a far step: as many rows and documents as lanes have by then, the same ones waiting.
    per_row = float(np.mean([lane["taken"]["corpus"] for lane in state["lane_states"].values()]))
    for lane in state["lane_states"].values():
        ahead = round(FAR_STEP * (per_row - len(lane["waiting"])))
        lane["row"] = FAR_STEP
        lane["waiting"] = [[name, number + ahead, window] for name, number, window in lane["waiting"]]
        lane["taken"]["corpus"] += ahead
    state["step"] = FAR_STEP - 1
    started = time.perf_counter()
    stream.load(json.loads(json.dumps(state)))
    loaded = time.perf_counter() - started
    started = time.perf_counter()
    stream.batch(FAR_STEP)
    print(f"resumed at step {FAR_STEP:,}: {loaded:.2f} s, batch({FAR_STEP:,}): {time.perf_counter() - started:.2f} s")
    print(f"peak of the process at the end: {memory_mb():.0f} MB")


def write_folder(template: Path, manifest: Path) -> None:
    """Every file of the manifest beside it, in full size and empty."""
    shutil.copy(template / VOCABULARY, manifest.parent)
    for shard in Manifest.load(manifest.parent).shards:
        for name, size in ((shard.name, shard.bytes), (index_name(shard.name), shard.index_bytes)):
            with open(manifest.parent / name, "wb") as file:
                file.truncate(size)


def open_folder(folder: Path) -> None:
    started = time.perf_counter()
    shards = TokenShards(folder)
    elapsed = time.perf_counter() - started
    print(f"local folder of {2 * len(shards.manifest.shards):,} files opened: {elapsed:.2f} s, {memory_mb():.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--documents", type=int, default=10_000, help="in each shard")
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    if args.open:
        open_folder(args.open)
        return
    with tempfile.TemporaryDirectory() as folder:
        template = make_tokens(Path(folder, "template"), args.documents, text=24, image=256)
        manifest = Path(folder, "whole", MANIFEST)
        manifest.parent.mkdir()
        write_manifest(template, args.shards, manifest)
        subprocess.run([sys.executable, __file__, "--measure", str(template), str(manifest)], check=True)
        write_folder(template, manifest)
        subprocess.run([sys.executable, __file__, "--open", str(manifest.parent)], check=True)


if __name__ == "__main__":
    main()

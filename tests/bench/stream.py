"""Documents per second and core of mmtrain's reader beside webdataset, megatron-energon and mosaicml-streaming.

    pip install mosaicml-streaming megatron-energon      # in an environment of its own: they pin other versions
    python tests/bench/stream.py [--tokens FOLDER/train]

All read the same documents (webdataset and Energon the very same tars, MosaicML its own format made of them), in a
shuffled order, in one process and one thread, and do the same work for each: its token ids as an array, copied into
the next free place of a (rows, length) int64 batch. They take turns, so that a busy machine disturbs all alike.
Peers that are not installed are left out, and said so. Afterwards the whole stream of mmtrain (CM3, packing, masks,
batches) is measured alone.
"""

import argparse
import importlib
import importlib.metadata
import io
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from mmtrain.config import ObjectiveConfig, StreamConfig
from mmtrain.shards import TokenShards, write_tokens
from mmtrain.stream import Order, Source, Stream
from mmtrain.tokens import TokenDocument, TokenSegment, Vocabulary

VOCABULARY = Vocabulary(8192, 8192, 16)
MEMBER = "npy"
BLOCK = 256
SHUFFLE_BUFFER = 1000  # what the peers' documentation shows

Documents = Iterator[np.ndarray]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, help="folder of token shards (default: made, --documents of them)")
    parser.add_argument("--documents", type=int, default=40_000)
    parser.add_argument("--text", type=int, default=24, help="text tokens per made document")
    parser.add_argument("--image", type=int, default=256, help="image tokens per made document")
    parser.add_argument("--length", type=int, default=2048, help="tokens per row")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0, help="per turn")
    parser.add_argument("--turns", type=int, default=5)
    return parser.parse_args()


def make_tokens(folder: Path, count: int, text: int, image: int) -> Path:
    """Token shards of caption-image pairs of random ids."""

    def document(i: int) -> TokenDocument:
        random = np.random.default_rng(i)
        words = random.integers(VOCABULARY.text_start, VOCABULARY.text_end, text)
        codes = random.integers(VOCABULARY.image_start, VOCABULARY.image_end, image)
        ids = np.concatenate([words, [VOCABULARY.brk], codes]).astype(VOCABULARY.dtype)
        segments = (TokenSegment("text", 0, text), TokenSegment("image", text + 1, image))
        return TokenDocument(f"document-{i:08d}", ids, segments, {})

    write_tokens(folder, (document(i) for i in range(count)), VOCABULARY, "t" * 12, "i" * 12)
    return folder


def of_mmtrain(shards: TokenShards) -> Documents:
    order = Order([shard.documents for shard in shards.manifest.shards], seed=0)
    for block in range(0, 1 << 60, BLOCK):
        _, indices = order.places(np.arange(block, block + BLOCK))
        for i in indices.tolist():
            yield shards.tokens(i)


def of_webdataset(shards: TokenShards) -> Documents:
    import webdataset

    urls = [str(Path(shards.store.location) / shard.name) for shard in shards.manifest.shards]
    while True:
        for sample in webdataset.WebDataset(urls, shardshuffle=100, seed=0).shuffle(SHUFFLE_BUFFER):
            yield np.load(io.BytesIO(sample[MEMBER]))


def of_energon(folder: Path) -> Documents:
    from megatron import energon
    from megatron.energon.savable_loader import BasicDataLoader

    @energon.stateless
    def cook(sample: dict) -> dict:
        return sample

    class Encoder(energon.TaskEncoder):
        decoder = None
        cookers = [energon.Cooker(cook)]

    workers = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = energon.get_train_dataset(
        str(folder),
        worker_config=workers,
        batch_size=None,
        shuffle_buffer_size=SHUFFLE_BUFFER,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
    )
    # By default it collects garbage every 10 samples.
    for sample in BasicDataLoader(dataset, gc_collect_every_n_steps=1 << 20):
        yield np.load(io.BytesIO(sample[MEMBER]))


def prepare_energon(shards: TokenShards, folder: Path) -> Path:
    folder.mkdir()
    for shard in shards.manifest.shards:
        shutil.copy(Path(shards.store.location) / shard.name, folder / shard.name)
    command = "--non-interactive --split-ratio 1,0,0 --sample-type CrudeWebdataset --num-workers 1 --no-progress"
    subprocess.run(["energon", "prepare", *command.split(), str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder


def of_mosaicml(folder: Path) -> Documents:
    from streaming import StreamingDataset

    # With its default look-ahead it sleeps most of the time.
    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=16, predownload=1 << 20)
    while True:
        for sample in dataset:
            yield sample["tokens"]


def prepare_mosaicml(shards: TokenShards, folder: Path) -> Path:
    from streaming import MDSWriter

    columns = {"id": "str", "tokens": f"ndarray:{shards.vocabulary.dtype.name}"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for i in range(len(shards)):
            writer.write({"id": shards.id(i), "tokens": shards.tokens(i)})
    return folder


def turn(documents: Documents, batch: np.ndarray, seconds: float) -> tuple[int, int, float]:
    """Fill batches for some seconds; returns documents, tokens and the seconds that it took."""
    rows, length = batch.shape
    row = place = count = tokens = 0
    started = time.perf_counter()
    while count % 256 or time.perf_counter() - started < seconds:
        ids = next(documents)[:length]
        size = len(ids)
        if place + size > length:
            row, place = (row + 1) % rows, 0
        batch[row, place : place + size] = ids
        place += size
        count += 1
        tokens += size
    return count, tokens, time.perf_counter() - started


def peers(shards: TokenShards, scratch: Path) -> dict[str, Documents]:
    """The readers that are installed."""
    made: dict[str, tuple[str, Callable[[], Documents]]] = {
        "webdataset": ("webdataset", lambda: of_webdataset(shards)),
        "megatron-energon": ("megatron.energon", lambda: of_energon(prepare_energon(shards, scratch / "energon"))),
        "mosaicml-streaming": ("streaming", lambda: of_mosaicml(prepare_mosaicml(shards, scratch / "mosaicml"))),
    }
    readers = {"mmtrain": of_mmtrain(shards)}
    for name, (module, make) in made.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        readers[f"{name} {importlib.metadata.version(name)}"] = make()
    return readers


def measure_stream(shards: TokenShards, length: int, rows: int, seconds: float) -> str:
    config = StreamConfig(sequence_length=length, global_batch=rows, lanes=rows)
    stream = Stream([Source("corpus", shards)], shards.vocabulary, config, ObjectiveConfig(), None, seed=0)
    stream.batch(0)
    documents = tokens = 0
    padding = []
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        stream.batch(stream.state()["step"] + 1)
        assert stream.counts
        documents += stream.counts.total("documents")
        tokens += int(stream.counts.lengths.sum())
        padding.append(stream.counts.padding)
    elapsed = time.perf_counter() - started
    return (
        f"whole stream (CM3, rows of {length}, {rows} per batch): {documents / elapsed:,.0f} documents/s, "
        f"{tokens / elapsed:,.0f} tokens/s, padding {100 * statistics.mean(padding):.2f} %"
    )


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        shards = TokenShards(args.tokens or make_tokens(scratch / "tokens", args.documents, args.text, args.image))
        batch = np.zeros((args.rows, args.length), dtype=np.int64)
        readers = peers(shards, scratch)
        rates: dict[str, list[float]] = {name: [] for name in readers}
        for reader in readers.values():
            turn(reader, batch, 0.5)  # buffers filled, pages in the cache
        for _ in range(args.turns):
            for name, reader in readers.items():
                count, _, elapsed = turn(reader, batch, args.seconds)
                rates[name].append(count / elapsed)
        mean = sum(s.text_tokens + s.image_tokens for s in shards.manifest.shards) / len(shards)
        print(
            f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}; {len(shards):,} "
            f"documents of {mean:.0f} text and image tokens on average; {args.turns} turns of {args.seconds} s each, "
            "one thread; ratio = median over turns of mmtrain / peer in the same turn"
        )
        print(f"{'reader':<28}{'documents/s':>14}{'mmtrain is':>14}")
        for name, values in rates.items():
            ratio = statistics.median(a / b for a, b in zip(rates["mmtrain"], values, strict=True))
            print(f"{name:<28}{statistics.median(values):>14,.0f}{f'{ratio:.1f} x':>14}")
        print(measure_stream(shards, args.length, args.rows, args.seconds))


if __name__ == "__main__":
    main()

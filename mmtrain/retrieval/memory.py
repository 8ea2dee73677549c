"""The memory: vectors, windows and columns of the documents that may be retrieved, with the index to search them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mmtrain.config import RetrievalConfig, UserError, write_text_atomic
from mmtrain.documents import decode_square, encode_png
from mmtrain.retrieval.encode import IMAGE, TEXT, Encoded, center, combine, mean_vectors
from mmtrain.retrieval.encoders import Encoder, open_encoder
from mmtrain.retrieval.filters import BLOCKED, HAS_IMAGE, HAS_TEXT, MemoryColumns, pick_diverse
from mmtrain.retrieval.index import TUNING_QUERIES, Index, build_index, plan_index
from mmtrain.shards import DocumentShards

FORMAT = 2
FACTS = "memory.json"
HITS = 4  # hits looked at per wanted document while generating: near-duplicates hide what comes behind them
COLUMNS = {"picture": np.uint64, "id": np.uint64, "cluster": np.uint64, "kinds": np.uint8}


def write_memory(
    parts: Sequence[Path], documents: DocumentShards, encoder: Encoder, config: RetrievalConfig, out: Path, seed: int
) -> None:
    """Write the memory of encoded documents (files of `Encoded`, in order) into `out`, memory.json last.

    vectors.npy: (w, d) float16 of unit norm. windows.npy: (w, 3) int64, document, window of it, windows of it.
    means.npy: (2, d) float32, subtracted from text and image vectors (zeros unless the encoder asks for it).
    picture, id, cluster, kinds .npy: as `MemoryColumns`. index.faiss, index.json: the index.
    Raises UserError for a memory with no document, or with none that is not of an evaluation set.
    """
    out.mkdir(parents=True, exist_ok=True)
    d = encoder.dimension
    means = np.zeros((2, d), np.float32)
    if encoder.is_centered:
        means = mean_vectors((Encoded.load(part) for part in parts), d)
    num_windows = sum(len(Encoded.load(part).windows) for part in parts)
    if num_windows == 0:
        raise UserError("the memory has no document to retrieve; add training documents or set retrieval.enabled=false")

    def column(name: str, dtype: type, *shape: int) -> np.memmap:
        return np.lib.format.open_memmap(out / f"{name}.npy", "w+", dtype, (num_windows, *shape))

    vectors, windows = column("vectors", np.float16, d), column("windows", np.int64, 3)
    columns = {name: column(name, dtype) for name, dtype in COLUMNS.items()}
    start = 0
    for part in map(Encoded.load, parts):
        rows = slice(start, start + len(part.windows))
        vectors[rows] = combine(part.text, part.image, means)
        windows[rows] = part.windows
        kinds = part.text.any(axis=1) * HAS_TEXT + part.image.any(axis=1) * HAS_IMAGE + part.blocked * BLOCKED
        for name, values in (("picture", part.picture), ("id", part.id), ("cluster", part.cluster), ("kinds", kinds)):
            columns[name][rows] = values
        start = rows.stop
    num_blocked = int(np.count_nonzero(columns["kinds"] & BLOCKED))
    if num_blocked == num_windows:
        raise UserError(
            "every document of the memory is in the evaluation sets of retrieval.block, so none may be retrieved; "
            "train on other documents, or take the set out of retrieval.block"
        )
    for array in (vectors, windows, *columns.values()):
        array.flush()
    np.save(out / "means.npy", means)
    budget = int(config.index_memory * 2**30)
    plan = plan_index(num_windows, d, budget, config.index)
    build_index(vectors, plan, out, seed, _tuning_queries(parts, means))
    facts = {
        "format_version": FORMAT,
        "retrieval": asdict(config),
        "encoder": encoder.fingerprint,
        "dimension": d,
        "windows": num_windows,
        "blocked": num_blocked,
        "documents": describe(documents),
    }
    write_text_atomic(out / FACTS, json.dumps(facts, indent=1) + "\n")


def _tuning_queries(parts: Sequence[Path], means: np.ndarray) -> np.ndarray:
    """(q, d) float32: text and image queries of some documents of every part, as a search would ask them."""
    queries: list[np.ndarray] = []
    share = -(-TUNING_QUERIES // len(parts))
    for part in map(Encoded.load, parts):
        rows = part.queries[:: max(1, 2 * len(part.queries) // share)]
        queries += [center(rows[:, channel], means[channel]) for channel in (TEXT, IMAGE)]
    found = np.concatenate(queries)
    return found[found.any(axis=1)]


def describe(shards: DocumentShards) -> dict[str, object]:
    """What tells document shards from others: the number of documents, the fingerprint, the first and last id."""
    n = len(shards)
    ends = [shards.id(0), shards.id(n - 1)] if n else []
    return {"documents": n, "fingerprint": shards.manifest.fingerprint, "first_and_last_id": ends}


class Memory:
    """A memory to search. Hits are numbers of its windows; `place` says where a window is.

    encoder: of texts and pictures; opened from what memory.json says when it is not given. Raises UserError for a
    folder that is not whole, or was made by another encoder.
    """

    def __init__(self, folder: Path, encoder: Encoder | None = None) -> None:
        self.folder = Path(folder)
        self.facts = read_facts(self.folder / FACTS)
        self.config = RetrievalConfig(**self.facts["retrieval"])
        self._encoder = encoder
        if encoder is not None:
            self._check(encoder)
        rows = self.facts["windows"]
        self.vectors = load_rows(self.folder, "vectors.npy", rows)
        self.means = load_rows(self.folder, "means.npy", 2)
        self._windows = load_rows(self.folder, "windows.npy", rows)

    def __len__(self) -> int:
        return len(self.vectors)

    @cached_property
    def columns(self) -> MemoryColumns:
        """What the filters look at."""
        return MemoryColumns(self.vectors, *(load_rows(self.folder, f"{name}.npy", len(self)) for name in COLUMNS))

    @cached_property
    def index(self) -> Index:
        """The index, memory-mapped."""
        return Index(self.folder, self.vectors)

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder that made the memory."""
        if self._encoder is None:
            self._encoder = open_encoder(self.config)
            self._check(self._encoder)
        return self._encoder

    def place(self, number: int) -> tuple[int, int, int]:
        """Document, window of it, and number of its windows, of a window of the memory."""
        document, window, count = self._windows[number].tolist()
        return document, window, count

    def search(self, text: str | None, pixels: np.ndarray | None, k: int) -> list[int]:
        """Up to k windows for a text, a picture ((S, S, 3) uint8 of any size S) or both, best first.

        For both they are taken in turns from what each finds: cosines of texts and of pictures do not compare. No two
        of them are near-duplicates; none is of an evaluation set, and all fit retrieval.modality.
        """
        ranks: dict[int, int] = {}
        for channel, vectors in self._encode(text, pixels):
            _, numbers = self.index.search(center(vectors, self.means[channel]), k * HITS)
            fitting = [number for number in numbers[0].tolist() if number >= 0 and self._may_stand(number)]
            for rank, number in enumerate(fitting):
                ranks[number] = min(2 * rank + channel, ranks.get(number, 2 * rank + channel))
        best = sorted(ranks, key=ranks.__getitem__)
        if not best:
            return []
        kept = pick_diverse(self.vectors[best].astype(np.float32), k, self.config.max_score)
        return [best[i] for i in kept]

    def _encode(self, text: str | None, pixels: np.ndarray | None) -> Iterable[tuple[int, np.ndarray]]:
        if text:
            yield TEXT, self.encoder.encode_texts([text])
        if pixels is not None:
            # To the size the encoder looks at, the way stored pictures got there.
            square = decode_square(encode_png(pixels), self.encoder.picture_size)
            yield IMAGE, self.encoder.encode_pictures(square[None])

    def _may_stand(self, number: int) -> bool:
        kinds = int(self.columns.kinds[number])
        is_whole = kinds & HAS_TEXT and kinds & HAS_IMAGE
        return not kinds & BLOCKED and (self.config.modality == "any" or bool(is_whole))

    def _check(self, encoder: Encoder) -> None:
        made_by = (self.facts["encoder"], self.facts["dimension"])
        if made_by != (encoder.fingerprint, encoder.dimension):
            raise UserError(
                f"the memory {self.folder} has vectors of {made_by[1]} numbers by the encoder {made_by[0]}, not of "
                f"{encoder.dimension} by {encoder.fingerprint}; give the retrieval.encoder and encoder_path it was "
                "made with, or build the neighbours again"
            )


def read_facts(path: Path) -> dict[str, Any]:
    """The JSON facts of a memory or of neighbours. Raises UserError if they cannot be read or are of another format."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        version = facts["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the neighbours {path} ({error}); build them again") from error
    if version != FORMAT:
        raise UserError(f"{path} has format {version}, this version reads {FORMAT}; build the neighbours again")
    return facts


def load_rows(folder: Path, name: str, rows: int) -> np.ndarray:
    """A memory-mapped .npy with so many rows. Raises UserError if it is damaged or has others."""
    path = Path(folder) / name
    try:
        array = np.load(path, mmap_mode="r" if rows else None, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); build the neighbours again") from error
    if len(array) != rows:
        raise UserError(f"{path} has {len(array)} rows, not the {rows} of the facts beside it; build it again")
    return array.view(np.ndarray)  # still mapped, but rows of a plain array are read several times faster

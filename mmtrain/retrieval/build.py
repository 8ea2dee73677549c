"""Build the neighbours artifact: for each document its candidates among the windows of a memory.

encode: documents of each split ─▶ vectors and columns   memory: those of train ─▶ vectors, index
search: each part of each split ─▶ candidates by text and by picture, with scores and the reasons against others

Every stage is a list of pieces that can be done again; `run` decides where, and keeps what is done.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mmtrain.config import RetrievalConfig, sync_tree, write_text_atomic
from mmtrain.config.randomness import random_stream
from mmtrain.retrieval.blocklist import BlockList
from mmtrain.retrieval.encode import IMAGE, TEXT, Encoded, center, combine, encode_documents
from mmtrain.retrieval.encoders import Encoder, open_encoder
from mmtrain.retrieval.filters import REASONS, Asker, judge
from mmtrain.retrieval.memory import FACTS, FORMAT, Memory, describe, write_memory
from mmtrain.shards import DocumentShards

PART_DOCUMENTS = 4096
SEARCH_BATCH = 1024
# Hits looked at per wanted neighbour, first and at most: near-duplicates may hide what comes behind them.
FIRST_HITS, MOST_HITS = 4, 64
SHOWN = 4  # hits that were passed over and are kept with their reasons, to look at
MEMORY, NEIGHBOURS = "memory", "neighbours.json"

Task = dict[str, Any]
Run = Callable[[Callable[[Task], Task], list[Task], Path, str], list[Task]]
"""work, tasks, the folder that keeps what is done, what it is called: the results in order."""


@dataclass(frozen=True)
class EncodeRange:
    """Work: documents first to stop (exclusive) of a split, encoded into a file."""

    documents: Mapping[str, Path]
    config: RetrievalConfig
    seed: int
    work: Path
    block: Path | None
    uses_gpu: ClassVar[bool] = True

    def __call__(self, task: Task) -> Task:
        shards, encoder = _open_documents(self.documents[task["split"]]), _open_encoder(self.config)
        before = encoder.flops
        encoded = encode_documents(
            (shards[i] for i in range(task["first"], task["stop"])),
            encoder,
            task["first"],
            self.config.query_dropout,
            self.seed,
            _open_block(self.block) if self.block and task["split"] == "train" else None,
        )
        encoded.save(part_path(self.work, "encode", task))
        return {"documents": task["stop"] - task["first"], "flops": encoder.flops - before}


@dataclass(frozen=True)
class SearchRange:
    """Work: candidates of the documents of an encoded file."""

    memory: Path
    config: RetrievalConfig
    seed: int
    work: Path

    def __call__(self, task: Task) -> Task:
        part = Encoded.load(part_path(self.work, "encode", task))
        numbers, scores, reasons, left_out = search(part, _open_memory(self.memory), self.config, self.seed)
        with open(part_path(self.work, "search", task), "wb") as file:
            np.savez(file, numbers=numbers, scores=scores, reasons=reasons)
        return {"documents": len(numbers), "left_out": dict(left_out)}


def run_here(work: Callable[[Task], Task], tasks: list[Task], done: Path, label: str) -> list[Task]:
    """Every task in this process, one after another; nothing is kept."""
    return [work(task) for task in tasks]


def build_neighbours(
    documents: Mapping[str, Path],
    config: RetrievalConfig,
    out: Path,
    seed: int,
    run: Run = run_here,
    block: Iterable[Path] = (),
    part_documents: int = PART_DOCUMENTS,
) -> None:
    """Fill `out` (perhaps an interrupted build of the same) with memory/, a folder per split, and flops.json.

    documents: folders of document shards by split; `train` is the memory of all of them. block: folders of document
    shards of evaluation sets, which are never retrieved, nor what is nearly the same.
    A neighbour is never the document itself nor of its near-duplicate cluster (meta["cluster"]), shares no picture
    with it, has a cosine of at most `max_score` to it, and both hold among the neighbours of one document too.

    SPLIT/numbers.npy: (n, 2, h) int64 windows of the memory by text and by image query, best first, -1 where there is
    none. scores.npy: float32 cosines. reasons.npy: uint8, 0 for a candidate, else the number in `REASONS` of why not.
    Raises UserError for an empty memory, and where encoding or the index does.
    """
    out = out.resolve()
    documents = {split: Path(folder).resolve() for split, folder in documents.items()}
    work = out / ".work"
    for stage in ("encode", "search"):
        (work / stage).mkdir(parents=True, exist_ok=True)
    shards = {split: DocumentShards(folder) for split, folder in documents.items()}
    tasks = [
        {"split": split, "number": number, "first": first, "stop": min(first + part_documents, len(of_split))}
        for split, of_split in shards.items()
        for number, first in enumerate(range(0, len(of_split), part_documents))
    ]
    blocked = _write_block(block, work / "block.npz")
    encode = EncodeRange(documents, config, seed, work, blocked)
    encoded = run(encode, tasks, work / "encoded", "encoding documents")
    memory = out / MEMORY
    if not (memory / FACTS).exists():
        parts = [part_path(work, "encode", task) for task in tasks if task["split"] == "train"]
        write_memory(parts, shards["train"], _open_encoder(config), config, memory, seed)
        sync_tree(memory)
    searched = run(SearchRange(memory, config, seed, work), tasks, work / "searched", "searching neighbours")
    for split in documents:
        left_out: Counter[str] = Counter()
        for task, result in zip(tasks, searched, strict=True):
            if task["split"] == split:
                left_out.update(result["left_out"])
        _write_split(out / split, [t for t in tasks if t["split"] == split], work, shards, config, left_out, seed)
    flops = {"retrieval_encode": sum(result["flops"] for result in encoded)}
    (out / "flops.json").write_text(json.dumps(flops))
    shutil.rmtree(work)


def search(
    part: Encoded, memory: Memory, config: RetrievalConfig, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Counter[str]]:
    """Candidates of n encoded documents: numbers, scores, reasons (n, 2, h) as `build_neighbours` stores them, and how
    many hits were passed over, by reason."""
    n, wanted = len(part.queries), config.num_candidates
    height = wanted + SHOWN
    numbers = np.full((n, 2, height), -1, np.int64)
    scores = np.zeros((n, 2, height), np.float32)
    reasons = np.zeros((n, 2, height), np.uint8)
    left_out: Counter[str] = Counter()
    askers = _askers(part, memory)
    for channel in (TEXT, IMAGE):
        queries = center(part.queries[:, channel], memory.means[channel])
        pending = np.flatnonzero(queries.any(axis=1))
        factor = FIRST_HITS
        while len(pending):
            depth = min(wanted * factor, len(memory))
            is_last = depth == len(memory) or factor >= MOST_HITS
            incomplete = []
            for start in range(0, len(pending), SEARCH_BATCH):
                rows = pending[start : start + SEARCH_BATCH]
                hits = _hits(queries, rows, depth, memory, config, askers, seed)
                for i, found_scores, found in zip(rows.tolist(), *hits, strict=True):
                    found, found_scores = found[found >= 0], found_scores[found >= 0]
                    taken = numbers[i, TEXT][(numbers[i, TEXT] >= 0) & (reasons[i, TEXT] == 0)]
                    verdicts = judge(
                        found, found_scores, askers[i], memory.columns, config.max_score, config.modality, wanted, taken
                    )
                    chosen, others = np.flatnonzero(verdicts == 0), np.flatnonzero(verdicts)
                    if len(chosen) < wanted and not is_last:
                        incomplete.append(i)
                        continue
                    left_out.update(REASONS[verdict] for verdict in verdicts[others].tolist())
                    kept = np.sort(np.concatenate([chosen, others[:SHOWN]]))
                    numbers[i, channel, : len(kept)] = found[kept]
                    scores[i, channel, : len(kept)] = found_scores[kept]
                    reasons[i, channel, : len(kept)] = verdicts[kept]
            pending = np.array(incomplete, np.int64)
            factor *= 4
    return numbers, scores, reasons, left_out


def part_path(work: Path, stage: str, task: Task) -> Path:
    """The file that a stage writes for a task."""
    return work / stage / f"{task['split']}-{task['number']:06d}.npz"


def _hits(
    queries: np.ndarray,
    rows: np.ndarray,
    depth: int,
    memory: Memory,
    config: RetrievalConfig,
    askers: list[Asker],
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (q, depth) and windows (q, depth) for some queries, nearest first; or windows drawn by lot."""
    if config.search == "nearest":
        return memory.index.search(queries[rows], depth)
    numbers = np.stack(
        [random_stream("random search", seed, askers[i].id).choice(len(memory), depth, False) for i in rows.tolist()]
    )
    # Row by row: the vectors of all rows at once may be gigabytes.
    scores = [memory.vectors[row].astype(np.float32) @ query for row, query in zip(numbers, queries[rows], strict=True)]
    return np.stack(scores), numbers


def _askers(part: Encoded, memory: Memory) -> list[Asker]:
    vectors = combine(part.text, part.image, memory.means)
    starts = np.flatnonzero(part.windows[:, 1] == 0)
    askers = []
    for start, count in zip(starts.tolist(), part.windows[starts, 2].tolist(), strict=True):
        rows = slice(start, start + count)
        askers.append(Asker(int(part.id[start]), int(part.cluster[start]), part.picture[rows], vectors[rows]))
    return askers


def _write_split(
    out: Path,
    tasks: list[Task],
    work: Path,
    shards: Mapping[str, DocumentShards],
    config: RetrievalConfig,
    left_out: Counter[str],
    seed: int,
) -> None:
    out.mkdir(exist_ok=True)
    n, height = len(shards[out.name]), config.num_candidates + SHOWN
    columns = {
        name: np.lib.format.open_memmap(out / f"{name}.npy", "w+", dtype, (n, 2, height))
        for name, dtype in (("numbers", np.int64), ("scores", np.float32), ("reasons", np.uint8))
    }
    without, num_candidates, total = 0, 0, 0.0
    for task in tasks:
        with np.load(part_path(work, "search", task), allow_pickle=False) as part:
            for name, column in columns.items():
                column[task["first"] : task["stop"]] = part[name]
            is_candidate = (part["numbers"] >= 0) & (part["reasons"] == 0)
            without += int((~is_candidate.any(axis=(1, 2))).sum())
            num_candidates += int(is_candidate.sum())
            total += float(part["scores"][is_candidate].sum(dtype=np.float64))
    for column in columns.values():
        column.flush()
    facts = {
        "format_version": FORMAT,
        "retrieval": asdict(config),
        "seed": seed,
        "memory": describe(shards["train"]),
        "queries": describe(shards[out.name]),
        "left_out": dict(left_out),
        "without_neighbours": without,
        "mean_score": total / num_candidates if num_candidates else None,
    }
    write_text_atomic(out / NEIGHBOURS, json.dumps(facts, indent=1) + "\n")


def _write_block(block: Iterable[Path], path: Path) -> Path | None:
    folders = list(block)
    if not folders:
        return None
    BlockList.of(document for folder in folders for document in DocumentShards(folder)).save(path)
    return path


@lru_cache(maxsize=2)
def _open_documents(folder: Path) -> DocumentShards:
    return DocumentShards(folder)


@lru_cache(maxsize=1)
def _open_memory(folder: Path) -> Memory:
    return Memory(folder)


@lru_cache(maxsize=1)
def _open_block(path: Path) -> BlockList:
    return BlockList.load(path)


_encoders: dict[str, Encoder] = {}


def _open_encoder(config: RetrievalConfig) -> Encoder:
    """One encoder per process."""
    key = repr(config)
    if key not in _encoders:
        _encoders.clear()
        _encoders[key] = open_encoder(config)
    return _encoders[key]

"""`mmtrain data build`: a corpus becomes document shards, in partitions that outlive a crash.

read: each partition ─▶ clean ─▶ a part: one shard, signatures, an account of what was left out
cluster: signatures of all parts ─▶ near-duplicates, exact copies, the side of every document
write: documents of all parts, in the order of the corpus ─▶ shards of train and validation

DOCUMENTS/.work holds the parts until the end.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mmtrain.config import CleanConfig, Config, CorpusConfig, UserError, sync_tree, write_text_atomic
from mmtrain.documents import Account, Document, judge, open_corpus
from mmtrain.documents.cleaning import clean, drop_pictures
from mmtrain.documents.clusters import find_clusters, validation_side
from mmtrain.documents.signatures import Signatures, sign
from mmtrain.shards import DocumentShards, ShardInfo, content_bytes, finish_documents, seal, write_document_shard
from mmtrain.verbs.partitions import Result, Task, run_partitions

SPLITS = ("train", "validation")
UNDECIDED, DROPPED = -1, -2  # beside the numbers of the splits


@dataclass(frozen=True)
class ReadPartition:
    """Work: a partition of the corpus, read and cleaned, as a part."""

    corpus: CorpusConfig
    clean: CleanConfig
    cache: Path
    parts: Path

    def __call__(self, task: Task) -> Result:
        part = part_folder(self.parts, task["number"])
        shutil.rmtree(part, ignore_errors=True)  # a process was killed while it wrote here
        part.mkdir(parents=True)
        account = Account(self.corpus.on_bad)
        signatures: list[Signatures] = []
        rows: list[tuple[int, int]] = []
        read = cleaned = 0

        def kept_documents() -> Iterator[Document]:
            nonlocal read, cleaned
            for document in open_corpus(self.corpus, self.cache).documents(task["partition"], account):
                read += 1
                kept = clean(document, self.clean, account)
                if kept is None:
                    cleaned += 1
                    continue
                side = kept.meta.get("split")
                rows.append((content_bytes(kept), SPLITS.index(side) if side in SPLITS else UNDECIDED))
                signatures.append(sign(kept))
                yield kept

        shard = write_document_shard(part, 0, islice(kept_documents(), task["limit"] or None))
        if rows:
            finish_documents(part, [shard])
        Signatures.concatenate(signatures).save(part / "signatures.npz")
        np.save(part / "rows.npy", np.array(rows, np.int64).reshape(-1, 2))
        sync_tree(part)
        return {"read": read, "cleaned": cleaned, "documents": shard.documents, **account.plain()}


@dataclass(frozen=True)
class WriteShard:
    """Work: documents first to stop (exclusive) of a side, from the parts into a final shard.

    They lose the pictures that are too common in the corpus, and are left out when nothing else is in them.
    """

    parts: Path
    plan: Path
    out: Path

    def __call__(self, task: Task) -> Result:
        numbers = np.load(self.plan / f"{task['split']}.npy", mmap_mode="r")[task["first"] : task["stop"]]
        cluster = np.load(self.plan / "cluster.npy", mmap_mode="r")
        start = np.load(self.plan / "start.npy")
        common = frozenset(json.loads((self.plan / "common.json").read_text()))
        account = Account()
        emptied = 0

        def documents() -> Iterator[Document]:
            nonlocal emptied
            shards, opened = None, -1
            for number, part in zip(numbers.tolist(), part_of(numbers, start).tolist(), strict=True):
                if part != opened:
                    shards, opened = DocumentShards(part_folder(self.parts, part)), part
                assert shards is not None
                document = shards[number - int(start[part])]
                kept = drop_pictures(document, common, account) if common else document
                if kept is None:
                    emptied += 1
                else:
                    yield replace(kept, meta=kept.meta | {"cluster": int(cluster[number])})

        shard = write_document_shard(self.out / task["split"], task["number"], documents())
        return {
            "shard": asdict(shard),
            "documents": shard.documents,
            "emptied": emptied,
            "account": account.plain(),
        }


def build_documents(config: Config, name: str, out: Path) -> None:
    """Fill `out` (perhaps an interrupted build of the same) with train/, validation/ and facts.json.

    Raises UserError for a corpus that cannot be read, or of which too much is damaged, and when a side stays empty.
    """
    work = out / ".work"
    if not (out / "facts.json").exists():
        work.mkdir(exist_ok=True)
        parts = _read(config, name, work)
        plan = _planned(config, name, parts, work)
        _write(config, name, parts, plan, work, out)
    shutil.rmtree(work, ignore_errors=True)
    seal(out)


def _read(config: Config, name: str, work: Path) -> list[Result]:
    """Stage 1: the parts of the corpus, up to its max_documents; what `ReadPartition` says of each."""
    corpus, cache = config.sources[name], Path(config.data_dir) / "downloads"
    listing = work / "partitions.json"
    if not listing.exists():  # listed once: an account of parts is worth something only if the parts stay the same
        account = Account(corpus.on_bad)
        partitions = open_corpus(corpus, cache).partitions(account)
        write_text_atomic(listing, json.dumps({"partitions": partitions, "account": account.plain()}))
    listed = json.loads(listing.read_text())
    tasks = [
        {"number": number, "partition": partition, "limit": corpus.max_documents}
        for number, partition in enumerate(listed["partitions"])
    ]
    read = ReadPartition(corpus, config.clean, cache, work / "parts")
    label, processes = f"reading {name}", config.data.processes
    parts = run_partitions(read, tasks, work / "read", label, processes, corpus.max_documents, config.runner)
    beyond = sum(part["documents"] for part in parts) - corpus.max_documents
    if corpus.max_documents and beyond > 0:  # the last part once more, and only what of it fits
        last = {**tasks[len(parts) - 1], "limit": parts[-1]["documents"] - beyond}
        parts[-1:] = run_partitions(read, [last], work / "read-last", label, processes, runner=config.runner)
    return [{"read": 0, "cleaned": 0, "documents": 0, **listed["account"]}, *parts]


def _planned(config: Config, name: str, parts: list[Result], work: Path) -> dict[str, Any]:
    """Stage 2, or what it left: plan/facts.json with the account so far and the shards to write."""
    facts = work / "plan" / "facts.json"
    if not facts.exists():
        facts.parent.mkdir(exist_ok=True)
        write_text_atomic(facts, json.dumps(_plan(config, name, parts, work)))
    return json.loads(facts.read_text())


def _plan(config: Config, name: str, parts: list[Result], work: Path) -> dict[str, Any]:
    corpus, plan = config.sources[name], work / "plan"
    account = Account()
    for part in parts:
        account.add(part)
    judge(account, sum(part["documents"] for part in parts), corpus)

    folders = [part_folder(work / "parts", number) for number in range(len(parts) - 1)]
    rows = [np.load(folder / "rows.npy") for folder in folders]
    size, side = np.concatenate(rows).T
    signatures = Signatures.concatenate([Signatures.load(folder / "signatures.npz") for folder in folders])
    clusters = find_clusters(signatures, config.dedupe)
    clusters.book(signatures, account)
    ids, times = np.unique(signatures.ids[~clusters.dropped], return_counts=True)
    if len(times) and times.max() > 1:
        raise UserError(f"document id {ids[times.argmax()].decode()} occurs twice in corpus {name}; ids must be unique")
    side = np.where(side == UNDECIDED, validation_side(clusters.cluster, corpus.validation_fraction), side)
    side[clusters.dropped] = DROPPED

    np.save(plan / "start.npy", np.cumsum([0, *(len(of_part) for of_part in rows)]))
    np.save(plan / "cluster.npy", clusters.cluster)
    (plan / "common.json").write_text(json.dumps(sorted(clusters.common_pictures)))
    tasks: list[Task] = []
    for number, split in enumerate(SPLITS):
        of_split = np.flatnonzero(side == number)
        if not len(of_split):
            hint = " or raise corpus.validation_fraction" if split == "validation" else ""
            raise UserError(f"corpus {name} has no {split} document; {account.summary() or f'add documents{hint}'}")
        np.save(plan / f"{split}.npy", of_split)
        tasks += [{"split": split, **cut} for cut in cut_by_bytes(size[of_split], config.data.shard_bytes)]
    sync_tree(plan)
    return {
        "account": account.plain(),
        "duplicates": int(clusters.dropped.sum()),
        "uncompared": clusters.num_uncompared,
        "tasks": tasks,
    }


def _write(config: Config, name: str, parts: list[Result], plan: dict[str, Any], work: Path, out: Path) -> None:
    """Stage 3: the shards and, when every document is accounted for, facts.json."""
    tasks = plan["tasks"]
    for split in SPLITS:
        (out / split).mkdir(exist_ok=True)
    write = WriteShard(work / "parts", work / "plan", out)
    label, processes = f"writing {name}", config.data.processes
    results = run_partitions(write, tasks, work / "write", label, processes, runner=config.runner)
    account = Account()
    account.add(plan["account"])
    for result in results:
        account.add(result["account"])
    written = {}
    for split in SPLITS:
        of_split = [r["shard"] for r, task in zip(results, tasks, strict=True) if task["split"] == split]
        manifest = finish_documents(out / split, [ShardInfo(**shard) for shard in of_split])
        written[split] = manifest.documents

    read = sum(part["read"] for part in parts)
    left_out = {
        "cleaned": sum(part["cleaned"] for part in parts),
        "duplicates": plan["duplicates"],
        "emptied": sum(result["emptied"] for result in results),
    }
    if read != sum(written.values()) + sum(left_out.values()):
        raise UserError(
            f"corpus {name}: {read:,} documents were read, but {sum(written.values()):,} written and {left_out} left "
            "out, which does not add up; this is a fault of mmtrain, please report it"
        )
    for reason, count in (account.bad + account.skipped).most_common():
        print(f"  left out {count:,}: {reason} (first: {account.examples[reason]})", flush=True)
    facts = {
        "corpus": asdict(config.sources[name]),
        "read": read,
        **{split: {"documents": documents} for split, documents in written.items()},
        "left_out": left_out,
        "uncompared": plan["uncompared"],
        **account.plain(),
        "partitions": parts[1:],
    }
    write_text_atomic(out / "facts.json", json.dumps(facts, indent=1))


def cut_by_bytes(sizes: np.ndarray, shard_bytes: int) -> list[dict[str, int]]:
    """Shards of at least `shard_bytes` (the last may be smaller): number, first and stop (exclusive) of each."""
    cuts = [0]
    ends = np.cumsum(sizes)
    while cuts[-1] < len(sizes):
        before = ends[cuts[-1] - 1] if cuts[-1] else 0
        cuts.append(min(len(sizes), int(np.searchsorted(ends, before + shard_bytes)) + 1))
    return [{"number": i, "first": first, "stop": stop} for i, (first, stop) in enumerate(pairwise(cuts))]


def part_of(numbers: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The part that each document is in; part i holds documents start[i] to start[i + 1] (exclusive)."""
    return np.searchsorted(start, numbers, side="right") - 1


def part_folder(parts: Path, number: int) -> Path:
    """Where the documents of a partition wait."""
    return parts / f"part-{number:06d}"

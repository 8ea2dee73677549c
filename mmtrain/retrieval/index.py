"""The index of a memory: finds vectors that are near, and scores them exactly by the stored float16 vectors.

Which kind (docs/explanation/retrieval.md): exact below 100,000 vectors; inverted lists of one bit a number (RaBitQ, Gao
and Long 2024) where they fit the memory that the index may take; else IVF-PQ, whose codes are made to fit and which is
memory-mapped. HNSW takes the place of RaBitQ, if it fits, for vectors without clusters. How far a search looks is tuned
once, on real queries, until it finds 95 % of the 10 nearest.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from mmtrain.config import UserError, write_text_atomic
from mmtrain.config.randomness import random_stream

INDEX, FACTS = "index.faiss", "index.json"
BLOCK = 1 << 16  # vectors that are widened to float32 at a time
PART = 1 << 23  # vectors that are added to inverted lists between two files
MOST_EXACT, MOST_EXACT_LISTS = 100_000, 4096  # an HNSW of 1,024 centers is slower than all of them
HNSW_LINKS, HNSW_CONSTRUCTION = 32, 80
CODE_BYTES = (256, 128, 64, 48, 32, 24, 16, 8)
ID_BYTES, FACTOR_BYTES = 8, 8
LIST_BLOCK = 32  # codes that fast scan stores together; each list fills half of its last block on average
POINTS_PER_CLUSTER, CLUSTER_ROUNDS = 39, 4  # fewer points than 39 make faiss warn
OPQ_ITERATIONS, OPQ_POINTS = 8, 32_768  # 50 and 65,536, the defaults, take 9 minutes on two cores
RECALL, NEAREST = 0.95, 10
MARGIN = 0.01  # other queries than those it is tuned on may find a little less
DEEPEST = 4096  # efSearch, nprobe
MOST_LISTS = 64  # a list costs 9 microseconds: where more must be searched, HNSW is faster
# Candidates by codes are re-scored: so many for each that is wanted (tuned, too), and at least so many. Codes of a few
# bytes rank well among hundreds and badly among ten: Deep1B's R@1 is .23 where R@100 is .77.
RESCORED, FEWEST_RESCORED = (4, 16, 64), 64
STAGNATES = 0.002  # recall that another doubling of the depth must give
TUNING_QUERIES = 512


@dataclass(frozen=True)
class IndexPlan:
    """kind: flat, rabitq, hnsw or ivfpq; factory: its name in faiss; depth: efSearch or nprobe (0: not tuned yet)."""

    kind: str
    num_vectors: int
    dimension: int
    factory: str
    bytes: int
    """Estimated memory while it is searched, the stored vectors themselves (memory-mapped) left out."""
    depth: int = 0
    rescored: int = RESCORED[0]
    """rabitq, ivfpq: candidates by codes that are scored exactly, for each that is wanted."""
    or_hnsw: bool = False
    """rabitq: HNSW fits as well, and is built instead where tuning finds that more than MOST_LISTS must be searched."""


def plan_index(n: int, d: int, memory_bytes: int, kind: str = "auto") -> IndexPlan:
    """The index for n vectors of d numbers that takes at most `memory_bytes` while it is searched.

    Raises UserError where no kind, or not the one that is asked for, fits.
    """
    clusters = num_clusters(n)
    lists, code_bytes = clusters // 2, -(-d // 8) + FACTOR_BYTES  # a list costs more than what is in it
    list_bytes = 4 * d + 8 * HNSW_LINKS + LIST_BLOCK // 2 * code_bytes
    rabitq_bytes = n * (code_bytes + ID_BYTES) + lists * list_bytes + 4 * d * d
    hnsw_bytes = n * (2 * d + 8 * HNSW_LINKS)
    or_hnsw = kind == "auto" and hnsw_bytes <= memory_bytes
    if kind == "auto":
        kind = "flat" if n < MOST_EXACT else "rabitq" if rabitq_bytes <= memory_bytes else "ivfpq"
    if kind == "flat":
        return IndexPlan(kind, n, d, "Flat", BLOCK * d * 4)
    if kind in ("rabitq", "hnsw"):
        num_bytes = rabitq_bytes if kind == "rabitq" else hnsw_bytes
        if num_bytes > memory_bytes:
            raise UserError(
                f"an index of {n:,} vectors of kind {kind} takes {num_bytes / 2**30:.1f} GiB, and "
                f"retrieval.index_memory={memory_bytes / 2**30:g} allows less; raise it or set retrieval.index=ivfpq"
            )
        # The rotation spreads what tells vectors apart over all bits.
        quantizer = f"_HNSW{HNSW_LINKS}" if lists > MOST_EXACT_LISTS else ""
        factory = f"RR{d},IVF{lists}{quantizer},RaBitQfs" if kind == "rabitq" else f"HNSW{HNSW_LINKS},SQfp16"
        return IndexPlan(kind, n, d, factory, num_bytes, or_hnsw=or_hnsw)
    for m in CODE_BYTES:
        y = d // m * m
        num_bytes = n * (m + ID_BYTES) + clusters * (4 * y + 8 * HNSW_LINKS)
        if m <= d // 2 and num_bytes <= memory_bytes:
            return IndexPlan(kind, n, d, f"OPQ{m}_{y},IVF{clusters}_HNSW{HNSW_LINKS},PQ{m}x8", num_bytes)
    raise UserError(
        f"an index of {n:,} vectors takes {num_bytes / 2**30:.2f} GiB at the least, and retrieval.index_memory="
        f"{memory_bytes / 2**30:g} allows less; raise it"
    )


def num_clusters(n: int) -> int:
    """Inverted lists of n vectors: the power of two next to 4 sqrt(n) up to a million, then by autofaiss's steps."""
    if n <= 10**6:
        return max(16, 1 << round(np.log2(max(4 * np.sqrt(n), 1))))
    return 16_384 if n < 10**7 else 65_536 if n < 3 * 10**8 else 131_072


def build_index(
    vectors: np.ndarray, plan: IndexPlan, folder: Path, seed: int, queries: np.ndarray | None = None
) -> None:
    """Write index.faiss (but for `flat`, which needs none) and index.json, the last, into `folder`.

    vectors: (n, d) float16 of unit norm, memory-mapped or not. queries: (q, d) float32 to tune on (default: some of
    the vectors). An interrupted build goes on with the parts it has written. The outcome depends on the seed and, as
    the graph of HNSW grows in threads, on the order in which they come.
    Raises UserError for vectors that are none or not finite.
    """
    if not len(vectors):
        raise UserError("the memory has no vector to search; add training documents")
    for start, block in _blocks(vectors):
        bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if len(bad):
            raise UserError(f"vector {start + bad[0]} of the memory is not finite; build the neighbours again")
    facts: dict[str, Any] = {"plan": asdict(plan)}
    if plan.kind != "flat":
        if queries is None or not len(queries):
            rows = random_stream("tuning queries", seed).choice(len(vectors), min(len(vectors), TUNING_QUERIES), False)
            queries = vectors[np.sort(rows)].astype(np.float32)
        if len(queries) > TUNING_QUERIES:
            queries = queries[:: -(-len(queries) // TUNING_QUERIES)]
        index = _hnsw(vectors, plan) if plan.kind == "hnsw" else _inverted_lists(vectors, plan, folder, seed)
        plan, recall = _tuned(plan, _rescored(index, vectors), vectors, queries)
        if plan.or_hnsw and plan.depth > MOST_LISTS:
            hnsw = plan_index(plan.num_vectors, plan.dimension, sys.maxsize, "hnsw")
            index = _hnsw(vectors, hnsw)
            plan, recall = _tuned(hnsw, _rescored(index, vectors), vectors, queries)
        faiss.write_index(index, str(folder / INDEX))
        with open(folder / INDEX, "rb+") as file:
            os.fsync(file.fileno())
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        num_bytes = (folder / INDEX).stat().st_size
        facts = {"plan": asdict(plan), "recall_at_10": recall, "bytes": num_bytes, "sha256": digest}
    write_text_atomic(folder / FACTS, json.dumps(facts, indent=1) + "\n")
    for part in folder.glob("part-*.faiss"):
        part.unlink()


class Index:
    """Search among stored vectors (n, d) float16, which must be those that the index was built of.

    verify: also read index.faiss once to compare its SHA-256. Raises UserError for an index that is damaged or of
    other vectors.
    """

    def __init__(self, folder: Path, vectors: np.ndarray, verify: bool = False) -> None:
        path = Path(folder) / INDEX
        try:
            facts = json.loads((Path(folder) / FACTS).read_text())
            self.plan = IndexPlan(**facts["plan"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"cannot read {Path(folder) / FACTS} ({error}); build the neighbours again") from error
        if (self.plan.num_vectors, self.plan.dimension) != vectors.shape:
            raise UserError(
                f"the index in {folder} is of {self.plan.num_vectors:,} vectors of {self.plan.dimension} numbers, not "
                f"of {vectors.shape[0]:,} of {vectors.shape[1]}; build the neighbours again"
            )
        self._vectors = vectors
        self._index = None
        if self.plan.kind != "flat":
            size = path.stat().st_size if path.is_file() else 0
            if size != facts["bytes"]:
                raise UserError(
                    f"{path} has {size:,} bytes instead of {facts['bytes']:,}: it was cut short; build the neighbours "
                    "again"
                )
            if verify:
                with open(path, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                        raise UserError(f"{path} has changed since it was built; build the neighbours again")
            self._index = _rescored(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC), vectors)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k' = min(k, n) nearest vectors of each query by inner product, best first.

        queries: (q, d) float32. Returns scores (q, k') float32, exact for the stored vectors, and numbers (q, k')
        int64; -1 with score -inf where an index found fewer.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        k = min(k, len(self._vectors))
        if self._index is None:
            return exact_search(self._vectors, queries, k)
        return _search(self._index, self.plan, queries, k)


def exact_search(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of (n, d) float16 vectors for (q, d) float32 queries: scores (q, k), numbers (q, k), best first."""
    best = np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
    for start, block in _blocks(vectors):
        scores, numbers = faiss.knn(queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        if start == 0 and len(block) == len(vectors):
            return scores, numbers
        scores = np.concatenate([best[0], scores], axis=1)
        numbers = np.concatenate([best[1], numbers + start], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(scores, order, 1), np.take_along_axis(numbers, order, 1)
    return best


def _rescored(index: Any, vectors: np.ndarray) -> Any:
    """The index with the stored vectors behind it, which score its candidates exactly and are not copied."""
    data = np.ascontiguousarray(vectors).reshape(-1).view(np.uint8)
    stored: Any = faiss.IndexScalarQuantizer(
        vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    codes: Any = faiss.MaybeOwnedVectorUInt8
    stored.codes = codes.create_view(faiss.swig_ptr(data), data.nbytes, stored.codes.owner)
    stored.referenced_objects = [data]
    stored.ntotal, stored.is_trained = len(vectors), True
    return faiss.IndexRefine(index, stored)


def _search(index: Any, plan: IndexPlan, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    wanted = k
    if plan.kind == "hnsw":  # ranks by the same float16 vectors
        parameters = _parameters("SearchParametersHNSW", efSearch=max(plan.depth, k))
    else:
        wanted = min(plan.num_vectors, max(plan.rescored * k, FEWEST_RESCORED))
        lists = _parameters("SearchParametersIVF", nprobe=plan.depth)
        parameters = _parameters("SearchParametersPreTransform", index_params=lists)
    refined = _parameters("IndexRefineSearchParameters", k_factor=wanted / k, base_index_params=parameters)
    scores, numbers = index.search(queries, k, params=refined)
    scores[numbers < 0] = -np.inf
    return scores, numbers


def _parameters(name: str, **values: Any) -> Any:
    """One of faiss's parameter classes; its annotations do not know what they take."""
    return getattr(faiss, name)(**values)


def _tuned(plan: IndexPlan, index: Any, vectors: np.ndarray, queries: np.ndarray) -> tuple[IndexPlan, float]:
    """The plan with the least depth, to an eighth, that finds enough of the nearest, and the share that it finds."""
    queries = np.ascontiguousarray(queries, np.float32)
    k = min(NEAREST, len(vectors))
    _, expected = exact_search(vectors, queries, k)

    def recall(plan: IndexPlan) -> float:
        _, found = _search(index, plan, queries, k)
        return float(np.mean([np.isin(row, of).mean() for row, of in zip(expected, found, strict=True)]))

    for rescored in RESCORED[:1] if plan.kind == "hnsw" else RESCORED:
        low, high, before = 0, 16 if plan.kind == "hnsw" else 1, 0.0
        while (share := recall(plan := replace(plan, depth=high, rescored=rescored))) < RECALL + MARGIN:
            if high >= DEEPEST or (plan.kind != "hnsw" and share - before < STAGNATES):
                break
            low, high, before = high, 2 * high, share
        else:
            while high - low > max(1, high // 8):
                middle = replace(plan, depth=(low + high) // 2)
                if (at_middle := recall(middle)) >= RECALL + MARGIN:
                    plan, high, share = middle, middle.depth, at_middle
                else:
                    low = middle.depth
            break
    return plan, share


def _hnsw(vectors: np.ndarray, plan: IndexPlan) -> Any:
    index: Any = faiss.index_factory(plan.dimension, plan.factory, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = HNSW_CONSTRUCTION
    index.train(vectors[:1].astype(np.float32))  # half precision has nothing to learn
    for _, block in _blocks(vectors):
        index.add(block)
    return index


def _inverted_lists(vectors: np.ndarray, plan: IndexPlan, folder: Path, seed: int) -> Any:
    """Trained on a sample; added in parts, each of which becomes a file; merged."""
    trained = folder / "part-trained.faiss"
    if not trained.exists():
        index: Any = faiss.index_factory(plan.dimension, plan.factory, faiss.METRIC_INNER_PRODUCT)
        ivf = faiss.extract_index_ivf(index)
        count = min(len(vectors), max(POINTS_PER_CLUSTER * ivf.nlist, 1 << 16))
        picked = np.sort(random_stream("index sample", seed).choice(len(vectors), count, replace=False))
        ivf.cp.seed, ivf.cp.niter = seed % 2**31, CLUSTER_ROUNDS
        if plan.kind == "ivfpq":
            rotation: Any = faiss.downcast_VectorTransform(index.chain.at(0))
            rotation.niter, rotation.max_train_points = OPQ_ITERATIONS, OPQ_POINTS
        if faiss.get_num_gpus():
            ivf.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(ivf.d))
        index.train(vectors[picked].astype(np.float32))
        _write_part(index, trained)
    parts = []
    for number, start in enumerate(range(0, len(vectors), PART)):
        part = folder / f"part-{number:04d}.faiss"
        parts.append(part)
        if part.exists():
            continue
        index = faiss.read_index(str(trained))
        ivf = faiss.extract_index_ivf(index)
        for first, block in _blocks(vectors[start : start + PART]):
            ids = np.arange(start + first, start + first + len(block), dtype=np.int64)
            index.add_with_ids(block, ids)
        _write_part(index, part)
    merged = faiss.read_index(str(parts[0]))
    lists = faiss.extract_index_ivf(merged)
    for part in parts[1:]:
        added = faiss.read_index(str(part))  # has a name, as its lists die with it
        lists.merge_from(faiss.extract_index_ivf(added), 0)
    merged.ntotal = lists.ntotal
    return merged


def _write_part(index: Any, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    faiss.write_index(index, str(temporary))
    os.replace(temporary, path)


def _blocks(vectors: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(vectors), BLOCK):
        yield start, np.ascontiguousarray(vectors[start : start + BLOCK], np.float32)

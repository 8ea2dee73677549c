"""Build the neighbours artifact: for each query document its nearest, but not too near, documents of a memory."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from mmtrain.config import RetrievalConfig, write_text_atomic
from mmtrain.config.randomness import random_stream
from mmtrain.retrieval.encode import Parts, combine, encode_parts
from mmtrain.retrieval.hashed import encode_text
from mmtrain.retrieval.search import exact_search, pick_diverse
from mmtrain.shards import DocumentShards

FORMAT = 1
SEARCH_BATCH = 4096
# Hits looked at per wanted neighbour, first and at most: near-duplicates may hide what comes behind them.
FIRST_HITS, MOST_HITS = 4, 64


def build_neighbours(
    train: DocumentShards,
    queries: DocumentShards,
    config: RetrievalConfig,
    out: Path,
    seed: int,
    encoded: Path | None = None,
) -> None:
    """Write neighbours.npy, scores.npy, vectors.npy, means.npy and neighbours.json into `out`.

    train: the memory. queries: documents that look for neighbours, the memory itself or others. A neighbour is never
    the document itself nor of its near-duplicate cluster (meta["cluster"]), shares no picture with it, has a cosine of
    at most `max_score` to it, and both hold among the neighbours of one document too. `query_dropout` of a query's
    words are left out of its search.
    encoded: an artifact of the same memory, whose vectors are used instead of encoding the memory again.

    neighbours.npy: (n, num_candidates) int64, nearest first, -1 where there is none. scores.npy: the same shape,
    float32, 0 where there is none. vectors.npy: (m, d) float16, the memory. means.npy: (2, d) float32.
    """
    out.mkdir(parents=True, exist_ok=True)
    query_facts = _Facts.of(queries)
    parts = encode_parts(queries, config)
    if queries.manifest.fingerprint == train.manifest.fingerprint:
        memory_facts, means = query_facts, parts.means()
        memory = combine(parts, means)
    else:
        memory_facts = _Facts.of(train)
        memory, means = _encoded_memory(train, config, encoded) or _encode_memory(train, config)
    whole = combine(parts, means)
    search = combine(_with_dropped_words(query_facts, parts, config, seed), means)

    finder = _Finder(memory, memory_facts, config)
    neighbours = np.full((len(queries), config.num_candidates), -1, dtype=np.int64)
    scores = np.zeros((len(queries), config.num_candidates), dtype=np.float32)
    for i, found, found_scores in finder.find(search, whole, query_facts):
        neighbours[i, : len(found)] = found
        scores[i, : len(found)] = found_scores
    np.save(out / "neighbours.npy", neighbours)
    np.save(out / "scores.npy", scores)
    np.save(out / "vectors.npy", memory.astype(np.float16))
    np.save(out / "means.npy", means)
    facts = {
        "format_version": FORMAT,
        "retrieval": asdict(config),
        "seed": seed,
        "memory": _describe(train),
        "queries": _describe(queries),
        "left_out": dict(finder.left_out),
        "without_neighbours": int((neighbours < 0).all(axis=1).sum()),
        "mean_score": float(scores[neighbours >= 0].mean()) if (neighbours >= 0).any() else None,
    }
    write_text_atomic(out / "neighbours.json", json.dumps(facts, indent=1) + "\n")


@dataclass(frozen=True)
class _Facts:
    """What the search has to know of documents beside their vectors, aligned with them."""

    ids: list[str]
    clusters: list[object]
    """Near-duplicate clusters; the id of a document that has none."""
    pictures: list[frozenset[str]]
    texts: list[str]

    @classmethod
    def of(cls, shards: DocumentShards) -> "_Facts":
        facts = cls([], [], [], [])
        for document in shards:
            facts.ids.append(document.id)
            facts.clusters.append(document.meta.get("cluster", document.id))
            facts.pictures.append(frozenset(image.sha256 for image in document.images))
            facts.texts.append(" ".join(document.texts))
        return facts


def _encode_memory(train: DocumentShards, config: RetrievalConfig) -> tuple[np.ndarray, np.ndarray]:
    parts = encode_parts(train, config)
    means = parts.means()
    return combine(parts, means), means


def _encoded_memory(
    train: DocumentShards, config: RetrievalConfig, folder: Path | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Vectors and means out of another artifact, if it is of this memory and encoder."""
    if folder is None:
        return None
    facts = json.loads((folder / "neighbours.json").read_text(encoding="utf-8"))
    encoder = (facts["retrieval"]["encoder"], facts["retrieval"]["dimension"])
    if facts["memory"] != _describe(train) or encoder != (config.encoder, config.dimension):
        return None
    return np.load(folder / "vectors.npy").astype(np.float32), np.load(folder / "means.npy")


def _with_dropped_words(facts: _Facts, parts: Parts, config: RetrievalConfig, seed: int) -> Parts:
    """The queries' vectors with a share of the words left out (a query with no word left keeps all)."""
    if config.query_dropout == 0.0 or not facts.ids:
        return parts
    texts = parts.text.copy()
    for i, (id, text) in enumerate(zip(facts.ids, facts.texts, strict=True)):
        words = text.split()
        kept = random_stream("query dropout", seed, id).random(len(words)) >= config.query_dropout
        if kept.any():
            texts[i] = encode_text(" ".join(w for w, keep in zip(words, kept, strict=True) if keep), config.dimension)
    return replace(parts, text=texts)


def _describe(shards: DocumentShards) -> dict[str, object]:
    n = len(shards)
    ends = [shards.id(0), shards.id(n - 1)] if n else []
    return {"documents": n, "fingerprint": shards.manifest.fingerprint, "first_and_last_id": ends}


class _Finder:
    """Search and filter; `left_out` counts the hits that were passed over, by reason."""

    def __init__(self, memory: np.ndarray, facts: _Facts, config: RetrievalConfig) -> None:
        self._memory, self._facts, self._config = memory, facts, config
        self.left_out: Counter[str] = Counter()

    def find(
        self, search: np.ndarray, whole: np.ndarray, queries: _Facts
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For every query its number, the indices of its neighbours and their scores.

        search: (n, d) vectors to rank by; whole: (n, d) vectors of the whole documents, to tell near-duplicates by.
        """
        wanted = self._config.num_candidates
        pending = np.arange(len(search))
        factor = FIRST_HITS
        while len(pending):
            hits = wanted * factor
            is_last = hits >= len(self._memory) or factor >= MOST_HITS
            incomplete = []
            for start in range(0, len(pending), SEARCH_BATCH):
                numbers = pending[start : start + SEARCH_BATCH]
                scores, indices = exact_search(self._memory, search[numbers], hits)
                for i, row_scores, row in zip(numbers.tolist(), scores, indices, strict=True):
                    chosen, reasons = self._filter(row_scores, row, whole[i], queries, i)
                    if len(chosen) < wanted and not is_last:
                        incomplete.append(i)
                        continue
                    self.left_out.update(reasons)
                    yield i, row[chosen], row_scores[chosen]
            pending = np.array(incomplete, dtype=np.int64)
            factor *= 4

    def _filter(
        self, scores: np.ndarray, row: np.ndarray, whole: np.ndarray, queries: _Facts, i: int
    ) -> tuple[np.ndarray, Counter[str]]:
        """Places in `row` (hits of query i, nearest first) that may be neighbours, and why others may not."""
        limit = self._config.max_score
        reasons: Counter[str] = Counter()
        vectors = self._memory[row]
        is_near = (np.maximum(scores, vectors @ whole) > limit).tolist()
        id, cluster, pictures = queries.ids[i], queries.clusters[i], queries.pictures[i]
        seen = set(pictures)
        usable = []
        for place, index in enumerate(row.tolist()):
            other = self._facts.pictures[index]
            if self._facts.ids[index] == id:
                reasons["self"] += 1
            elif not pictures.isdisjoint(other):
                reasons["same_picture"] += 1
            elif self._facts.clusters[index] == cluster:
                reasons["same_cluster"] += 1
            elif is_near[place]:
                reasons["near_duplicate"] += 1
            elif not seen.isdisjoint(other):
                reasons["picture_of_another_neighbour"] += 1
            else:
                usable.append(place)
                seen |= other
        kept = pick_diverse(vectors[usable], self._config.num_candidates, limit)
        looked_at = kept[-1] + 1 if len(kept) == self._config.num_candidates else len(usable)
        reasons["near_duplicate_of_another_neighbour"] += looked_at - len(kept)
        return np.array(usable, dtype=np.int64)[kept], +reasons

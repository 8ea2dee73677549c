"""Exact search by inner product, and the choice among what it finds."""

import faiss
import numpy as np

from mmtrain.config import UserError


def exact_search(memory: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest memory vectors of each query, nearest first, by inner product.

    memory: (m, d); queries: (n, d); float32. Returns scores (n, k') float32 and indices (n, k') int64 with
    k' = min(k, m). Raises UserError for vectors that are not finite.
    """
    for name, vectors in (("memory", memory), ("query", queries)):
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise UserError(f"the {name} vector of document {bad[0]} is not finite; build the neighbours again")
    k = min(k, len(memory))
    if k == 0 or len(queries) == 0:
        return np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int64)
    index = faiss.IndexFlatIP(memory.shape[1])
    index.add(np.ascontiguousarray(memory, dtype=np.float32))
    return index.search(np.ascontiguousarray(queries, dtype=np.float32), k)


def pick_diverse(vectors: np.ndarray, k: int, max_score: float) -> list[int]:
    """Greedily keep up to k rows, in order, each with a cosine of at most `max_score` to all rows kept before.

    vectors: (n, d) of unit norm. Returns row numbers.
    """
    cosines = vectors @ vectors.T
    kept: list[int] = []
    for i in range(len(vectors)):
        if len(kept) == k:
            break
        if not kept or cosines[i, kept].max() <= max_score:
            kept.append(i)
    return kept

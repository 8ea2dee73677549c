"""The index of a memory: finds the nearest vectors and scores them exactly."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import faiss
import numpy as np

from mmtrain.config import UserError, write_text_atomic

INDEX = "index.json"
BLOCK = 65536  # vectors that are widened to float32 at a time


@dataclass(frozen=True)
class IndexPlan:
    """kind: flat (exact, no file beside the vectors)."""

    kind: str
    num_vectors: int
    dimension: int


def plan_index(n: int, d: int, memory_bytes: int, kind: str = "auto") -> IndexPlan:
    """The index for n vectors of d numbers that takes at most `memory_bytes` while it is searched."""
    return IndexPlan("flat", n, d)


def build_index(vectors: np.ndarray, plan: IndexPlan, folder: Path, seed: int) -> None:
    """Write index.json for vectors (n, d) float16 of unit norm, memory-mapped or not.

    Raises UserError for vectors that are none or not finite.
    """
    if not len(vectors):
        raise UserError("the memory has no vector to search; add training documents")
    for start in range(0, len(vectors), BLOCK):
        bad = np.flatnonzero(~np.isfinite(vectors[start : start + BLOCK]).all(axis=1))
        if len(bad):
            raise UserError(f"vector {start + bad[0]} of the memory is not finite; build the neighbours again")
    write_text_atomic(folder / INDEX, json.dumps(asdict(plan), indent=1) + "\n")


class Index:
    """Search among stored vectors (n, d) float16. Raises UserError for an index of other vectors."""

    def __init__(self, folder: Path, vectors: np.ndarray) -> None:
        try:
            self.plan = IndexPlan(**json.loads((Path(folder) / INDEX).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"cannot read {Path(folder) / INDEX} ({error}); build the neighbours again") from error
        if (self.plan.num_vectors, self.plan.dimension) != vectors.shape:
            raise UserError(f"the index in {folder} is of other vectors; build the neighbours again")
        self._vectors = vectors

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k' = min(k, n) nearest vectors of each query by inner product, best first.

        queries: (q, d) float32. Returns scores (q, k') float32, exact for the stored vectors, and numbers (q, k')
        int64.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        k = min(k, len(self._vectors))
        best = np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        for start in range(0, len(self._vectors), BLOCK):
            block = np.ascontiguousarray(self._vectors[start : start + BLOCK], np.float32)
            scores, numbers = faiss.knn(queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
            scores = np.concatenate([best[0], scores], axis=1)
            numbers = np.concatenate([best[1], numbers + start], axis=1)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            best = np.take_along_axis(scores, order, 1), np.take_along_axis(numbers, order, 1)
        return best

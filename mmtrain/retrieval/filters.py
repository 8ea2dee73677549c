"""Which hits of a search may stand in front of a document, and why others may not."""

from dataclasses import dataclass

import numpy as np

REASONS = (
    "",  # a candidate
    "self",
    "same_cluster",
    "same_picture",
    "evaluation",
    "modality",
    "near_duplicate",
    "picture_of_another_neighbour",
    "near_duplicate_of_another_neighbour",
)
HAS_TEXT, HAS_IMAGE, BLOCKED = 1, 2, 4
HAS_BOTH = HAS_TEXT | HAS_IMAGE
SELF, CLUSTER, PICTURE, EVALUATION, MODALITY, NEAR, PICTURE_OF_OTHER, NEAR_OTHER = range(1, len(REASONS))


@dataclass(frozen=True)
class MemoryColumns:
    """w windows of a memory: vectors (w, d) float16; picture, id, cluster (w,) uint64; kinds (w,) uint8.

    kinds: bit 0 it has text, bit 1 it has a picture, bit 2 it is of an evaluation set.
    """

    vectors: np.ndarray
    picture: np.ndarray
    id: np.ndarray
    cluster: np.ndarray
    kinds: np.ndarray



@dataclass(frozen=True)
class Asker:
    """The query document: hashes of its id and cluster, its pictures (k,) uint64, its vectors (windows, d) float32."""

    id: int
    cluster: int
    pictures: np.ndarray
    vectors: np.ndarray


def judge(
    numbers: np.ndarray,
    scores: np.ndarray,
    asker: Asker,
    memory: MemoryColumns,
    max_score: float,
    modality: str,
    wanted: int,
    taken: np.ndarray,
) -> np.ndarray:
    """A reason for each hit, by number in `REASONS`: (n,) uint8, 0 for the first `wanted` that may be neighbours.

    numbers, scores: (n,) hits of one channel, best first. taken: (t,) window numbers that another channel has chosen:
    they may be chosen again, what is too near to them may not. modality: any | both (text and a picture). What comes
    after the last wanted one is not looked at and has no entry.
    """
    kinds = memory.kinds[numbers]
    vectors = memory.vectors[numbers].astype(np.float32)
    nearest = np.maximum(scores, (vectors @ asker.vectors.T).max(axis=1))
    pictures = memory.picture[numbers]
    reasons = np.select(
        [
            memory.id[numbers] == asker.id,
            memory.cluster[numbers] == asker.cluster,
            np.isin(pictures, asker.pictures) & (pictures != 0),
            (kinds & BLOCKED) != 0,
            (modality == "both") & ((kinds & HAS_BOTH) != HAS_BOTH),
            nearest > max_score,
        ],
        [SELF, CLUSTER, PICTURE, EVALUATION, MODALITY, NEAR],
        0,
    ).astype(np.uint8)
    chosen_vectors = [row.astype(np.float32) for row in memory.vectors[taken]]
    chosen_pictures = set(memory.picture[taken].tolist()) - {0}
    already = set(taken.tolist())
    num_chosen = 0
    for i in np.flatnonzero(reasons == 0).tolist():
        if num_chosen == wanted:
            return reasons[:i]
        if int(numbers[i]) not in already:
            if int(pictures[i]) in chosen_pictures:
                reasons[i] = PICTURE_OF_OTHER
                continue
            if chosen_vectors and max(float(vectors[i] @ other) for other in chosen_vectors) > max_score:
                reasons[i] = NEAR_OTHER
                continue
            chosen_vectors.append(vectors[i])
            chosen_pictures |= {int(pictures[i])} - {0}
        num_chosen += 1
    return reasons


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

"""The training sequence and the weight of each of its targets."""

from dataclasses import dataclass

import numpy as np

from mmtrain.config import ObjectiveConfig
from mmtrain.tokens import Vocabulary


@dataclass(frozen=True, eq=False)
class TrainingSequence:
    """One sequence as the model sees it, from the first `<eos>` on."""

    tokens: np.ndarray
    """(n,) ids of `vocabulary.dtype`."""
    loss_weight: np.ndarray
    """(n,) float32; entry t weighs the prediction of `tokens[t + 1]`; the last entry is 0."""
    is_retrieved: np.ndarray
    """(n,) bool; the token belongs to a retrieved document, also where a mask moved it."""
    cell: np.ndarray
    """(n,) int32; place of an image token in its picture (raster order), also where a mask moved it; else -1."""
    num_masks: int = 0
    window: int = 0
    """Number of this window of its document."""
    num_windows: int = 1
    """Windows that the query document was split into to fit."""
    dropped_retrieved: int = 0
    """Retrieved documents left out to fit."""

    @property
    def retrieved(self) -> int:
        """Number of tokens that belong to retrieved documents."""
        return int(np.count_nonzero(self.is_retrieved))

    def __len__(self) -> int:
        return len(self.tokens)


def target_weights(
    tokens: np.ndarray, is_retrieved: np.ndarray, vocabulary: Vocabulary, config: ObjectiveConfig
) -> np.ndarray:
    """Loss weight of every target, aligned with the token that predicts it.

    A target that is a sentinel weighs `sentinel_loss_weight`, an image token `image_loss_weight`, any other 1;
    inside a retrieved document that is multiplied by `retrieved_loss_weight` (RA-CM3), in the first of several
    segments by `first_segment_loss_weight`.
    tokens, is_retrieved: (n,). Returns (n,) float32 with 0 at the end, where nothing is predicted.
    """
    weight = np.ones(len(tokens), dtype=np.float32)
    if config.sentinel_loss_weight != 1.0:
        is_sentinel = (tokens >= vocabulary.sentinel_start) & (tokens < vocabulary.sentinel_end)
        weight[is_sentinel] = config.sentinel_loss_weight
    if config.image_loss_weight != 1.0:
        weight[(tokens >= vocabulary.image_start) & (tokens < vocabulary.image_end)] = config.image_loss_weight
    if config.retrieved_loss_weight != 1.0:
        weight[is_retrieved] *= config.retrieved_loss_weight
    if config.first_segment_loss_weight != 1.0:
        weight[_first_of_several(tokens, vocabulary)] *= config.first_segment_loss_weight
    weight[:-1] = weight[1:]
    weight[-1:] = 0.0
    return weight


def _first_of_several(tokens: np.ndarray, vocabulary: Vocabulary) -> slice:
    """Where the first segment with text or image tokens stands, boundary excluded; empty when no other follows."""
    has_content = (tokens >= vocabulary.text_start) & (tokens < vocabulary.image_end)
    start = int(has_content.argmax())
    boundaries = np.flatnonzero((tokens[start:] == vocabulary.brk) | (tokens[start:] == vocabulary.eos))
    end = start + int(boundaries[0]) if len(boundaries) else len(tokens)
    return slice(start, end if has_content[end:].any() else start)


def mark_retrieved(num_tokens: int, num_retrieved: int) -> np.ndarray:
    """(num_tokens,) bool of an assembled sequence: its first token is `<eos>`, then the retrieved ones come."""
    marks = np.zeros(num_tokens, dtype=bool)
    marks[1 : 1 + num_retrieved] = True
    return marks

"""Prompts of generation, cut out of the very sequences that training builds, so that the two never differ.

The forms are CM3leon's: caption first, then the picture. `order="image_first"` gives those of a run that was trained
so; a run in random order knows both and is asked in the first way.
"""

from collections.abc import Sequence

import numpy as np

from mmtrain.config import UserError
from mmtrain.objective.assemble import assemble
from mmtrain.objective.cells import NO_CELL, picture_cells
from mmtrain.objective.cm3 import rotate
from mmtrain.tokens import Vocabulary


def infill_prompt(
    query: np.ndarray,
    spans: Sequence[tuple[int, int]],
    retrieved: Sequence[np.ndarray],
    vocabulary: Vocabulary,
    numbers: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`<eos> (R <break>)* Q <eos> <sentinel:0>`, each span of Q replaced by its sentinel; span 0 follows.

    query, each of retrieved: (n,) ids; spans: sorted disjoint (start, end) within the query; numbers: the sentinel of
    each (default: 0, 1, ... as in training). What follows is `span 0 <eoss> <sentinel:1> span 1 <eoss> ...`.
    Returns (n,) ids of `vocabulary.dtype` and (n,) int32 cells: codes stay in their places in the picture.
    Raises UserError where the vocabulary has too few sentinels.
    """
    if len(spans) > vocabulary.num_sentinels:
        raise UserError(
            f"{len(spans)} masked spans need as many sentinels, and the vocabulary has {vocabulary.num_sentinels}; "
            "mask fewer (a region over whole rows of the picture is one span)"
        )
    tokens, num_retrieved = assemble(query, retrieved, vocabulary)
    starts, ends = (np.asarray(spans, dtype=np.int64) + 1 + num_retrieved).T
    sentinels = vocabulary.sentinel_start + np.asarray(range(len(spans)) if numbers is None else numbers)
    rotated = rotate(tokens, starts, ends, sentinels, np.full(len(spans), vocabulary.eoss))
    outside = np.full(len(spans), NO_CELL)
    cell = rotate(picture_cells(tokens, vocabulary), starts, ends, outside, outside)
    end = len(tokens) + len(spans) - int((ends - starts).sum())
    opening = np.array([vocabulary.sentinel_start], dtype=rotated.dtype)
    return np.concatenate([rotated[:end], opening]), np.append(cell[:end], NO_CELL).astype(np.int32)


def pair(caption: np.ndarray, image: np.ndarray, vocabulary: Vocabulary, order: str = "text_first") -> np.ndarray:
    """`T <break> I`, or `I <break> T` with order="image_first". caption, image: (n,) ids."""
    first, second = (image, caption) if order == "image_first" else (caption, image)
    return np.concatenate([first, [vocabulary.brk], second])


def text_to_image_prompt(
    caption: np.ndarray, retrieved: Sequence[np.ndarray], vocabulary: Vocabulary, order: str = "text_first"
) -> np.ndarray:
    """`<eos> (R <break>)* T <break>`; the picture follows.

    image_first: `<eos> (R <break>)* <sentinel:0> <break> T <eos> <sentinel:0>`; the picture and `<eoss>` follow.
    caption, each of retrieved: (n,) ids of the vocabulary. Returns (n,) ids of `vocabulary.dtype`.
    """
    if order == "image_first":
        any_image = np.array([vocabulary.image_start])
        query = pair(caption, any_image, vocabulary, order)
        return infill_prompt(query, [(0, 1)], retrieved, vocabulary)[0]
    return _opening(np.append(caption, vocabulary.brk), retrieved, vocabulary)


def unconditional_image_prompt(
    retrieved: Sequence[np.ndarray], vocabulary: Vocabulary, order: str = "text_first"
) -> np.ndarray:
    """The prompt of classifier-free guidance's unconditional stream; the picture follows.

    With retrieved documents `<eos> (R <break>)*`, without `<eos> <sentinel:0> <break>`: a masked caption. image_first:
    `<eos> (R <break>)*` in both cases, since a document of such a run begins with its picture.
    """
    if retrieved or order == "image_first":
        return _opening(np.empty(0, dtype=vocabulary.dtype), retrieved, vocabulary)
    any_pair = np.array([vocabulary.unk, vocabulary.brk])
    return infill_prompt(any_pair, [(0, 1)], [], vocabulary)[0][:3]


def caption_prompt(
    image: np.ndarray,
    retrieved: Sequence[np.ndarray],
    vocabulary: Vocabulary,
    order: str = "text_first",
    words_before: np.ndarray | None = None,
) -> np.ndarray:
    """`<eos> (R <break>)* W <sentinel:0> <break> I <eos> <sentinel:0>`; the caption follows, until `<eoss>`.

    image_first: `<eos> (R <break>)* I <break> W`; the caption follows, until `<eos>`.
    image: (n,) ids of the vocabulary; words_before: W, the text that the caption begins with, such as a question.
    """
    words = np.empty(0, dtype=np.int64) if words_before is None else words_before
    if order == "image_first":
        return _opening(pair(words, image, vocabulary, order), retrieved, vocabulary)
    query = pair(np.append(words, vocabulary.unk), image, vocabulary)
    return infill_prompt(query, [(len(words), len(words) + 1)], retrieved, vocabulary)[0]


def _opening(query: np.ndarray, retrieved: Sequence[np.ndarray], vocabulary: Vocabulary) -> np.ndarray:
    """`<eos> (R <break>)* Q`."""
    tokens, _ = assemble(query, retrieved, vocabulary)
    return tokens[:-1]

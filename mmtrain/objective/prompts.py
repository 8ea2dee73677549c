"""Prompts of generation, cut out of the very sequences that training builds, so that the two never differ.

The forms are CM3leon's (caption first, then the picture).
"""

from collections.abc import Sequence

import numpy as np

from mmtrain.objective.assemble import assemble
from mmtrain.objective.cm3 import rotate
from mmtrain.tokens import Vocabulary


def text_to_image_prompt(caption: np.ndarray, retrieved: Sequence[np.ndarray], vocabulary: Vocabulary) -> np.ndarray:
    """`<eos> (R <break>)* T <break>`; the picture follows.

    caption, each of retrieved: (n,) ids of the vocabulary. Returns (n,) ids of `vocabulary.dtype`.
    """
    tokens, _ = assemble(np.append(caption, vocabulary.brk), retrieved, vocabulary)
    return tokens[:-1]


def unconditional_image_prompt(retrieved: Sequence[np.ndarray], vocabulary: Vocabulary) -> np.ndarray:
    """The prompt of classifier-free guidance's unconditional stream; the picture follows.

    With retrieved documents `<eos> (R <break>)*`, without `<eos> <sentinel:0> <break>`: a masked caption.
    """
    if retrieved:
        tokens, _ = assemble(np.empty(0, dtype=vocabulary.dtype), retrieved, vocabulary)
        return tokens[:-1]
    any_caption = np.array([vocabulary.unk])
    masked = _mask_first_segment(np.append(any_caption, vocabulary.brk), [], vocabulary)
    return masked[:3]


def caption_prompt(image: np.ndarray, retrieved: Sequence[np.ndarray], vocabulary: Vocabulary) -> np.ndarray:
    """`<eos> (R <break>)* <sentinel:0> <break> I <eos> <sentinel:0>`; the caption follows, until `<eoss>`.

    image: (n,) ids of the vocabulary.
    """
    any_caption = np.array([vocabulary.unk])
    masked = _mask_first_segment(np.concatenate([any_caption, [vocabulary.brk], image]), retrieved, vocabulary)
    return masked[: -len(any_caption) - 1]


def _mask_first_segment(query: np.ndarray, retrieved: Sequence[np.ndarray], vocabulary: Vocabulary) -> np.ndarray:
    """The CM3 sequence of `query` with the first segment masked."""
    tokens, num_retrieved = assemble(query, retrieved, vocabulary)
    start = np.array([1 + num_retrieved])
    end = start + int(np.flatnonzero(query == vocabulary.brk)[0])
    return rotate(tokens, start, end, np.array([vocabulary.sentinel_start]), np.array([vocabulary.eoss]))

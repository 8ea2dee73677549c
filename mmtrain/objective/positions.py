"""Positions of a training sequence, for models that learn one vector per position."""

import numpy as np

from mmtrain.tokens import MODALITIES, Vocabulary

IMAGE = MODALITIES.index("image")


def positions(tokens: np.ndarray, vocabulary: Vocabulary, alignment: int) -> np.ndarray:
    """(n,) int64 from 0, one more at each token; with `alignment` a picture after `<break>` or `<eos>` starts at the
    next multiple of it.

    Behind captions of different lengths a learned position then still means one row and column of the picture.
    tokens: (n,) ids. Positions stay below n + alignment x pictures.
    """
    plain = np.arange(len(tokens))
    if alignment == 0 or len(tokens) == 0:
        return plain
    is_image = vocabulary.modality(np.asarray(tokens, dtype=np.int64)) == IMAGE
    after_boundary = np.isin(tokens[:-1], (vocabulary.brk, vocabulary.eos))
    shift, jumps = 0, np.zeros(len(tokens), dtype=np.int64)
    for start in (np.flatnonzero(is_image[1:] & after_boundary) + 1).tolist():
        jumps[start] = -(start + shift) % alignment
        shift += int(jumps[start])
    return plain + np.cumsum(jumps)

"""Where image tokens stand in their pictures, for models that learn a vector per row and column."""

import numpy as np

from mmtrain.tokens import MODALITIES, Vocabulary

IMAGE = MODALITIES.index("image")
NO_CELL = -1


def picture_cells(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """(n,) int32: for each image token its number in its picture, from 0 in raster order; -1 for all others.

    tokens: (n,) ids with whole pictures, as `assemble` returns them; a boundary stands between two pictures.
    """
    is_image = vocabulary.modality(np.asarray(tokens, dtype=np.int64)) == IMAGE
    place = np.arange(len(tokens), dtype=np.int32)
    last_other = np.maximum.accumulate(np.where(is_image, -1, place)) if len(tokens) else place
    return np.where(is_image, place - last_other - 1, NO_CELL).astype(np.int32)

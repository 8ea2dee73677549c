"""The `hashed` encoder: classical features of text and pictures, random projections, nothing learned.

It finds documents that share words or look alike in color, layout and texture. It does not know that a dog is an
animal; a learned encoder does, and takes this one's place when one is configured.
"""

import re
import zlib
from collections import Counter
from functools import lru_cache
from itertools import pairwise

import numpy as np

from mmtrain.config.randomness import random_stream

BUCKETS = 1 << 14
TRIGRAM_WEIGHT = 0.3  # a word weighs 1; its 3 to 10 trigrams together weigh about the same
PICTURE_SIZE = 64
CELLS = 8
ORIENTATIONS = 8
COLOR_LEVELS = 4
PICTURE_FEATURES = CELLS * CELLS * (3 + ORIENTATIONS) + COLOR_LEVELS**3
FLOPS_PER_PICTURE = 2 * PICTURE_FEATURES  # and component of the vector: the projection, next to which the rest is small
# Number of the first edge direction of the cell that each pixel lies in.
_ROW, _COLUMN = np.indices((PICTURE_SIZE, PICTURE_SIZE)) * CELLS // PICTURE_SIZE
FIRST_EDGE = (_ROW * CELLS + _COLUMN) * ORIENTATIONS
WORD = re.compile(r"\w+")
# sRGB to brightness, red-green and yellow-blue: opponent colors weigh hue as an eye does more than RGB distances do.
OPPONENT = np.array([[1 / 3, 1.0, 0.5], [1 / 3, -1.0, 0.5], [1 / 3, 0.0, -1.0]], dtype=np.float32)


def encode_text(text: str, dimension: int) -> np.ndarray:
    """Word and letter-trigram counts, projected: (dimension,) float32 of unit norm, zeros for a text with no word.

    A word seen n times weighs 1 + ln n.
    """
    vector = np.zeros(dimension, dtype=np.float32)
    for word, count in Counter(WORD.findall(text.casefold())).items():
        vector += (1.0 + np.log(count)) * _word_vector(word, dimension)
    return unit(vector)


def encode_picture(pixels: np.ndarray, dimension: int) -> np.ndarray:
    """`picture_features`, projected: (dimension,) float32 of unit norm; pixels: (64, 64, 3) uint8."""
    return unit(picture_features(pixels) @ _picture_projection(dimension))


def picture_features(pixels: np.ndarray) -> np.ndarray:
    """Colors and edge directions of 8 x 8 cells and a color histogram: (PICTURE_FEATURES,) float32.

    pixels: (64, 64, 3) uint8. Each of the three parts has unit norm.
    """
    side = PICTURE_SIZE // CELLS
    by_row = pixels.reshape(CELLS, side, PICTURE_SIZE * 3).sum(axis=1, dtype=np.float32)
    colors = by_row.reshape(CELLS, CELLS, side, 3).sum(axis=2) @ OPPONENT
    values = pixels.astype(np.int16)
    gray = values[..., 0] + values[..., 1] + values[..., 2]
    down, right = np.zeros(gray.shape, np.float32), np.zeros(gray.shape, np.float32)
    down[1:-1], right[:, 1:-1] = gray[2:] - gray[:-2], gray[:, 2:] - gray[:, :-2]
    angle = np.arctan2(down, right) * (ORIENTATIONS / np.pi)
    direction = np.floor(angle).astype(np.int64) % ORIENTATIONS  # a direction and its opposite are one
    edges = np.bincount(
        (FIRST_EDGE + direction).ravel(),
        weights=np.hypot(down, right).ravel(),
        minlength=CELLS * CELLS * ORIENTATIONS,
    )
    levels = (values // (256 // COLOR_LEVELS)) @ np.array([COLOR_LEVELS**2, COLOR_LEVELS, 1], dtype=np.int16)
    histogram = np.bincount(levels.ravel(), minlength=COLOR_LEVELS**3)
    # Square roots: a flat background fills most of a histogram and must not be all that counts.
    parts = (colors.ravel(), np.sqrt(edges), np.sqrt(histogram))
    return np.concatenate([unit(part.astype(np.float32)) for part in parts])


def text_features(text: str) -> np.ndarray:
    """Buckets of the words of a text, of their letter trigrams and of each two words in a row: (n,) int64."""
    words = WORD.findall(text.casefold())
    found = [_bucket(word) for word in words]
    found += [_bucket(trigram) for word in words for trigram in _trigrams(word)]
    found += [_bucket(f"{first} {second}") for first, second in pairwise(words)]
    return np.array(found, np.int64)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Divide by the norm along the last axis; zeros stay zeros."""
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norm > 0, norm, 1.0)


@lru_cache(maxsize=20_000)
def _word_vector(word: str, dimension: int) -> np.ndarray:
    trigrams = [_bucket(trigram) for trigram in _trigrams(word)]
    signs = _text_projection(dimension)
    return signs[_bucket(word)] + TRIGRAM_WEIGHT * signs[trigrams].sum(axis=0, dtype=np.float32)


def _trigrams(word: str) -> list[str]:
    padded = f" {word} "
    return [padded[i : i + 3] for i in range(len(padded) - 2)]


def _bucket(feature: str) -> int:
    return zlib.crc32(feature.encode()) % BUCKETS


@lru_cache(maxsize=2)
def _text_projection(dimension: int) -> np.ndarray:
    """(BUCKETS, dimension) int8 of +1 and -1, a constant of the encoder."""
    bits = random_stream("hashed encoder", "text").integers(0, 2, size=(BUCKETS, dimension), dtype=np.int8)
    return 2 * bits - 1


@lru_cache(maxsize=2)
def _picture_projection(dimension: int) -> np.ndarray:
    """(PICTURE_FEATURES, dimension) float32 normal, a constant of the encoder."""
    stream = random_stream("hashed encoder", "picture")
    return stream.standard_normal((PICTURE_FEATURES, dimension), dtype=np.float32)

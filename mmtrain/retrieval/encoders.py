"""Encoders: texts and pictures to unit vectors of one space, behind one interface."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from mmtrain.config import RetrievalConfig
from mmtrain.retrieval.hashed import FLOPS_PER_PICTURE, PICTURE_SIZE, encode_picture, encode_text


class Encoder(Protocol):
    """What turns texts and pictures into vectors.

    fingerprint: equal for equal vectors. picture_size: side of the pictures it takes. is_centered: its vectors are
    compared after the mean of the memory is subtracted. flops: spent so far by this object, 1 multiply-add = 2.
    """

    dimension: int
    fingerprint: str
    picture_size: int
    is_centered: bool
    flops: int

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d) float32 of unit norm, zeros for a text with no word in it."""

    def encode_pictures(self, pixels: np.ndarray) -> np.ndarray:
        """(n, S, S, 3) uint8 to (n, d) float32 of unit norm."""


class HashedEncoder:
    """Words and looks by classical features, random projections, nothing learned (`hashed.py`)."""

    picture_size = PICTURE_SIZE
    is_centered = True

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self.fingerprint = f"hashed-1-{dimension}"
        self.flops = 0

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Sums of constant vectors, one per word: additions that are not counted."""
        vectors = [encode_text(text, self.dimension) for text in texts]
        return np.stack(vectors) if vectors else np.zeros((0, self.dimension), np.float32)

    def encode_pictures(self, pixels: np.ndarray) -> np.ndarray:
        """Counts the projection of the features."""
        self.flops += len(pixels) * FLOPS_PER_PICTURE * self.dimension
        vectors = [encode_picture(picture, self.dimension) for picture in pixels]
        return np.stack(vectors) if vectors else np.zeros((0, self.dimension), np.float32)


def open_encoder(config: RetrievalConfig) -> Encoder:
    """The encoder that the section names; learned ones on the GPU of this process, if there is one."""
    if config.encoder == "clip":
        from mmtrain.retrieval.clip import ClipEncoder

        return ClipEncoder(config.encoder_path, "cuda" if torch.cuda.is_available() else "cpu")
    if config.encoder == "dual":
        from mmtrain.retrieval.dual import DualEncoder

        return DualEncoder(Path(config.encoder_path))
    return HashedEncoder(config.dimension)

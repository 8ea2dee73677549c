"""A memory of colored pictures with captions, written as real document shards."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from mmtrain.config.randomness import random_stream
from mmtrain.documents import Document, Image, encode_png
from mmtrain.shards import DocumentShards, write_documents

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "yellow": (240, 220, 40)}
ANIMALS = ("zebra", "otter", "falcon", "turtle", "salmon")


def picture(color: str, seed: int, size: int = 32) -> Image:
    """Noise and a random bright block on a color."""
    stream = random_stream("test picture", color, seed)
    pixels = np.clip(stream.normal(COLORS[color], 12, (size, size, 3)), 0, 255).astype(np.uint8)
    top, left = stream.integers(0, size // 2, 2)
    pixels[top : top + size // 3, left : left + size // 3] = stream.integers(0, 256, 3)
    data = encode_png(pixels)
    return Image(data, size, size, hashlib.sha256(data).hexdigest(), "png")


def pair(number: int, prefix: str = "doc") -> Document:
    """Documents of one animal share its name, those of one color their background."""
    color, animal = list(COLORS)[number % 4], ANIMALS[number % 5]
    caption = f"a photograph of a {animal} number {number} before a {color} wall"
    return Document(f"{prefix}-{number:04d}", "test", (caption, picture(color, number)), {})


@pytest.fixture
def shards(tmp_path: Path) -> Callable[[str, Iterable[Document]], DocumentShards]:
    def make(name: str, documents: Iterable[Document]) -> DocumentShards:
        write_documents(tmp_path / name, documents)
        return DocumentShards(tmp_path / name)

    return make

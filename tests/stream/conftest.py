"""Real token shards of random documents, written once."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmtrain.config import RetrievalConfig
from mmtrain.config.randomness import random_stream
from mmtrain.documents import Document
from mmtrain.retrieval import Neighbours, build_neighbours
from mmtrain.shards import TokenShards, write_documents, write_tokens
from mmtrain.tokens import TokenDocument, TokenSegment, Vocabulary

VOCABULARY = Vocabulary(300, 50, 16)


def token_document(number: int, name: str, text: int, image: int) -> TokenDocument:
    """The first two text ids spell the number, so that a test can tell documents apart."""
    stream = random_stream("test document", name, number)
    words = stream.integers(VOCABULARY.text_start, VOCABULARY.text_end, text)
    words[:2] = VOCABULARY.text_start + number // 300, VOCABULARY.text_start + number % 300
    codes = stream.integers(VOCABULARY.image_start, VOCABULARY.image_end, image)
    tokens = np.concatenate([words, [VOCABULARY.brk], codes]).astype(VOCABULARY.dtype)
    segments = (TokenSegment("text", 0, text), TokenSegment("image", text + 1, image))
    return TokenDocument(f"{name}-{number:05d}", tokens, segments, {})


def build_related(folder: Path, count: int, config: RetrievalConfig) -> Neighbours:
    """Neighbours of documents with the ids of `shards(count)`; those of equal number modulo 4 share their words."""
    words = ("apple pear plum", "truck wheel road", "river lake sea", "violin drum flute")
    write_documents(
        folder / "documents", (Document(f"a-{i:05d}", "test", (f"{words[i % 4]} {i}",), {}) for i in range(count))
    )
    build_neighbours({"train": folder / "documents"}, config, folder / "neighbours", seed=0)
    return Neighbours(folder / "neighbours/train")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TokenShards]:
    """shards(count, name="a", image=16): token shards of pairs of 2 to 12 text and `image` image tokens."""
    made: dict[tuple[int, str, int], Path] = {}

    def make(count: int, name: str = "a", image: int = 16) -> TokenShards:
        key = (count, name, image)
        if key not in made:
            folder = tmp_path_factory.mktemp("tokens")
            lengths = random_stream("test lengths", name).integers(2, 13, count).tolist()
            documents = (token_document(i, name, length, image) for i, length in enumerate(lengths))
            write_tokens(folder, documents, VOCABULARY, "t" * 12, "i" * 12)
            made[key] = folder
        return TokenShards(made[key])

    return make

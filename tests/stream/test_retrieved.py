"""The stream with retrieved documents."""

import numpy as np
import pytest
import torch

from mmtrain.config import ObjectiveConfig, RetrievalConfig, StreamConfig, UserError
from mmtrain.documents import Document
from mmtrain.objective import unrotate
from mmtrain.retrieval import Neighbours, build_neighbours
from mmtrain.shards import DocumentShards, write_documents
from mmtrain.stream import Source, Stream
from tests.stream.conftest import VOCABULARY

N = 24
CONFIG = RetrievalConfig(num_candidates=3, num_documents=2, policy="fixed", max_score=1.0)


@pytest.fixture
def neighbours(tmp_path) -> Neighbours:
    """Documents with the ids of the token documents; those with the same number modulo 4 share their words."""
    words = ("apple pear plum", "truck wheel road", "river lake sea", "violin drum flute")
    write_documents(
        tmp_path / "documents", (Document(f"a-{i:05d}", "test", (f"{words[i % 4]} {i}",), {}) for i in range(N))
    )
    documents = DocumentShards(tmp_path / "documents")
    build_neighbours(documents, documents, CONFIG, tmp_path / "neighbours", seed=0)
    return Neighbours(tmp_path / "neighbours")


def stream_of(source: Source, retrieval: RetrievalConfig | None, length: int = 256) -> Stream:
    return Stream([source], VOCABULARY, StreamConfig(sequence_length=length), ObjectiveConfig(), retrieval, seed=0)


def numbers_of(tokens: np.ndarray) -> list[int]:
    """Numbers of the documents in one sequence, the query last: each begins with two text ids after a boundary."""
    plain = unrotate(tokens, VOCABULARY)
    modality = VOCABULARY.modality(plain)
    starts = np.flatnonzero((modality[1:] == 1) & (modality[:-1] == 0)) + 1
    return [int((plain[s] - VOCABULARY.text_start) * 300 + plain[s + 1] - VOCABULARY.text_start) for s in starts]


def test_neighbours_stand_before_the_query(shards, neighbours):
    tokens = shards(N)
    stream = stream_of(Source("a", tokens, neighbours=neighbours, memory=tokens), CONFIG)
    batch = stream.batch(0)
    seen = 0
    for row, document in zip(batch["tokens"].numpy(), batch["document"].numpy(), strict=True):
        for number in range(document.max() + 1):
            *retrieved, query = numbers_of(row[document == number])
            assert len(retrieved) == 2 and set(retrieved) <= set(neighbours.candidates(query).tolist())
            assert all((other - query) % 4 == 0 for other in retrieved)
            seen += 1
    assert seen == stream.counts.total("documents")
    kinds = stream.counts.tokens
    assert 0.6 < kinds["retrieved"] / sum(kinds.values()) < 0.7


def test_without_retrieval_there_are_none(shards, neighbours):
    tokens = shards(N)
    with_neighbours = Source("a", tokens, neighbours=neighbours, memory=tokens)
    plain = stream_of(Source("a", tokens), None)
    expected = plain.batch(0)
    assert plain.counts.tokens["retrieved"] == 0
    for retrieval in (None, RetrievalConfig(enabled=False), RetrievalConfig(num_documents=0)):
        batch = stream_of(with_neighbours, retrieval).batch(0)
        assert all(torch.equal(batch[key], expected[key]) for key in batch)


def test_neighbours_that_do_not_fit_are_left_out_and_counted(shards, neighbours):
    tokens = shards(N)
    stream = stream_of(Source("a", tokens, neighbours=neighbours, memory=tokens), CONFIG, length=64)
    stream.batch(0)
    assert stream.counts.total("dropped_retrieved") > 0 and stream.counts.total("split_documents") == 0


def test_neighbours_of_other_documents_are_refused(shards, neighbours):
    tokens = shards(N)
    with pytest.raises(UserError, match="no memory"):
        Source("a", tokens, neighbours=neighbours)
    with pytest.raises(UserError, match="neighbours of 24"):
        Source("a", shards(40), neighbours=neighbours, memory=tokens)
    other = shards(N, "b")
    with pytest.raises(UserError, match="other documents"):
        Source("a", other, neighbours=neighbours, memory=other)

"""The stream with retrieved documents."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmtrain.config import ObjectiveConfig, RetrievalConfig, StreamConfig, UserError
from mmtrain.objective import unrotate
from mmtrain.retrieval import Neighbours
from mmtrain.shards import ShardInfo, TokenShards, finish_tokens
from mmtrain.stream import Source, Stream
from mmtrain.stream.source import Recipe
from mmtrain.verbs.join import JoinRange
from tests.stream.conftest import VOCABULARY, build_related

N = 24
CONFIG = RetrievalConfig(num_candidates=3, num_documents=2, policy="fixed", max_score=1.0)


@pytest.fixture
def neighbours(tmp_path) -> Neighbours:
    return build_related(tmp_path, N, CONFIG)


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


def join(tokens, neighbours, folder) -> TokenShards:
    """Inlined shards as `mmtrain retrieval join` writes them."""
    (folder / "tokens").mkdir(parents=True)
    (folder / "tokens/train").symlink_to(tokens.store.location)
    work = JoinRange(folder / "tokens", neighbours, folder / "inlined")
    (folder / "inlined/train").mkdir(parents=True)
    tasks = [{"split": "train", "number": i, "first": 8 * i, "stop": 8 * i + 8} for i in range(N // 8)]
    shards = [ShardInfo(**work(task)) for task in tasks]
    made_of = {"queries": tokens.manifest.fingerprint}
    finish_tokens(folder / "inlined/train", shards, tokens.vocabulary, "t" * 12, "i" * 12, made_of)
    return TokenShards(folder / "inlined/train")


@pytest.mark.parametrize("knobs", [{}, {"policy": "uniform", "order": "best_last"}, {"max_tokens": 40}])
def test_inlined_shards_give_the_same_batches_as_look_up(shards, neighbours, tmp_path, knobs):
    tokens = shards(N)
    inlined = Source("a", tokens, inlined=join(tokens, tmp_path / "neighbours", tmp_path / "join"))
    config = replace(CONFIG, **knobs)
    looked_up = stream_of(Source("a", tokens, neighbours=neighbours, memory=tokens), config)
    joined = stream_of(inlined, config)
    for step in range(8):
        batches = looked_up.batch(step), joined.batch(step)
        assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])
    assert joined.counts.tokens["retrieved"] > 0


def test_inlined_shards_of_other_tokens_are_refused(shards, neighbours, tmp_path):
    inlined = join(shards(N), tmp_path / "neighbours", tmp_path / "join")
    with pytest.raises(UserError, match="belong to other tokens"):
        Source("a", shards(N, "b"), inlined=inlined)


def test_a_token_budget_holds_for_retrieved_documents_alone(shards, neighbours):
    tokens = shards(N)
    longest = max(len(tokens.tokens(i)) for i in range(N)) + 1
    source = Source("a", tokens, neighbours=neighbours, memory=tokens)
    stream = stream_of(source, replace(CONFIG, max_tokens=longest))
    recipe = Recipe(ObjectiveConfig(kind="causal"), replace(CONFIG, max_tokens=longest), 256, 0)
    for i in range(N):
        (sequence,) = recipe.sequences(source, 0, i)
        assert 0 < sequence.retrieved <= longest
    stream.batch(0)
    assert stream.counts.total("dropped_retrieved") > 0

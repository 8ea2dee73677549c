import json
import multiprocessing
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtrain.config import ObjectiveConfig, RetrievalConfig, StreamConfig, UserError
from mmtrain.objective import unrotate
from mmtrain.shards import TokenShards, finish_tokens, write_token_shard
from mmtrain.stream import COLUMNS, Source, Stream, merge_states, prefetch
from mmtrain.stream.mixture import ONE
from mmtrain.stream.source import Recipe
from tests.stream.conftest import VOCABULARY, token_document

REUSE = settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])


def stream_of(*sources: Source, objective: ObjectiveConfig | None = None, seed: int = 0, **knobs) -> Stream:
    config = StreamConfig(**{"sequence_length": 96, "global_batch": 8, "lanes": 6, "lookahead": 8, **knobs})
    return Stream(sources, VOCABULARY, config, objective or ObjectiveConfig(), RetrievalConfig(), seed)


def assert_same(one, other):
    assert all(torch.equal(one[key], other[key]) for key in one)


def documents_in(batch) -> list[int]:
    """Numbers of the documents in a batch, as the test documents spell them."""
    numbers = []
    for tokens, document in zip(batch["tokens"].numpy(), batch["document"].numpy(), strict=True):
        for number in range(document.max() + 1):
            plain = unrotate(tokens[document == number], VOCABULARY)
            high, low = (plain[1:3] - VOCABULARY.text_start).tolist()
            numbers.append(high * 300 + low)
    return numbers


def test_batch_has_the_promised_layout(shards):
    stream = stream_of(Source("a", shards(40)), objective=ObjectiveConfig(retrieved_loss_weight=0.5))
    batch = stream.batch(0)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "tokens": (torch.int64, (8, 96)),
        "targets": (torch.int64, (8, 96)),
        "loss_weight": (torch.float32, (8, 96)),
        "document": (torch.int32, (8, 96)),
        "position": (torch.int32, (8, 96)),
        "cell": (torch.int32, (8, 96)),
    }
    documents = 0
    for i in range(8):
        tokens, targets, weight, document, position, cell = (value[i] for value in batch.values())
        padding = document == -1
        assert (tokens[padding] == 0).all() and (targets[padding] == 0).all() and (weight[padding] == 0).all()
        assert (cell[padding] == -1).all()
        for number in range(int(document.max()) + 1):
            own = document == number
            documents += 1
            assert tokens[own][0] == VOCABULARY.eos
            assert position[own].tolist() == list(range(int(own.sum())))
            is_image = VOCABULARY.modality(tokens[own]) == 2
            assert sorted(cell[own][is_image].tolist()) == list(range(int(is_image.sum())))  # masks move it
            assert (cell[own][~is_image] == -1).all()
            assert targets[own][:-1].tolist() == tokens[own][1:].tolist()
            assert (weight[own][:-1] == 1).all() and weight[own][-1] == 0
    counts = stream.counts
    assert counts.total("documents") == documents == len(counts.lengths)
    assert counts.lengths.sum() == sum(counts.tokens.values()) == int((batch["document"] >= 0).sum())
    assert counts.padding == pytest.approx(1 - counts.lengths.sum() / (8 * 96))
    assert counts.tokens["image"] == int((VOCABULARY.modality(batch["tokens"]) == 2).sum())


@pytest.mark.parametrize("lanes", [1, 3, 4, 8, 16])
def test_world_size_changes_nothing(shards, lanes):
    whole = stream_of(Source("a", shards(40)), lanes=lanes)
    for world in (2, 4, 3):
        ranks = [stream_of(Source("a", shards(40)), lanes=lanes) for _ in range(world)]
        for step in range(4):
            expected = whole.batch(step)
            for rank, stream in enumerate(ranks):
                part = stream.batch(step, rank, world)
                assert_same({key: value[rank::world] for key, value in expected.items()}, part)


@REUSE
@given(st.integers(-1, 12), st.integers(0, 6), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_a_saved_stream_goes_on_with_the_same_batches(shards, step, ahead, world_before, world_after):
    sources = [Source("a", shards(40)), Source("b", shards(17, "b"), weight=0.4)]
    before = stream_of(*sources)
    for done in range(step + ahead + 1):  # the stream may be ahead of the step that is saved
        before.batch(done, 0, world_before)
    state = json.loads(json.dumps(before.state(step)))
    after, straight = stream_of(*sources), stream_of(*sources)
    after.load(state)
    for later in range(step + 1, step + 4):
        expected = straight.batch(later)
        for rank in range(world_after):
            part = after.batch(later, rank, world_after)
            assert_same({key: value[rank::world_after] for key, value in expected.items()}, part)


def test_ranks_can_save_their_own_lanes(shards):
    source = Source("a", shards(40))
    whole, ranks = stream_of(source, lanes=4), [stream_of(source, lanes=4) for _ in range(2)]
    for step in range(3):
        whole.batch(step)
        for rank, stream in enumerate(ranks):
            stream.batch(step, rank, 2)
    parts = [stream.state(rank=rank, world=2) for rank, stream in enumerate(ranks)]
    assert merge_states(parts) == whole.state()
    with pytest.raises(UserError, match="one rank only"):
        whole.load(parts[0])


def test_batches_can_be_asked_for_in_any_order(shards):
    stream, straight = stream_of(Source("a", shards(40))), stream_of(Source("a", shards(40)))
    expected = [straight.batch(step) for step in range(30)]
    for step in (20, 3, 29, 0, 28, 3):
        assert_same(stream.batch(step), expected[step])


@pytest.mark.parametrize("count", [3, 40, 61])
def test_each_epoch_delivers_every_document_once_in_another_order(shards, count):
    source = Source("a", shards(count))
    stream = stream_of(source, lookahead=3)
    delivered = [number for step in range(count // 2 + 6) for number in documents_in(stream.batch(step))]
    states = stream.state()["lane_states"]
    passed = [
        int(lane) + len(states) * number
        for lane, state in states.items()
        for number in set(range(state["taken"]["a"])) - {number for _, number, _ in state["waiting"]}
    ]
    recipe = Recipe(ObjectiveConfig(), None, 96, seed=0)
    epoch, index = recipe.order(source).places(np.sort(passed))
    assert sorted(delivered) == sorted(index.tolist())  # no document is lost or doubled on its way into the rows
    orders = [index[epoch == e].tolist() for e in range(epoch.max() + 1)]
    complete = [order for order in orders if len(order) == count]
    assert len(complete) >= 2
    assert all(sorted(order) == list(range(count)) for order in complete)
    assert len({tuple(order) for order in complete}) > 1


@pytest.mark.parametrize("shuffle_shards", [0, 1, 2])
def test_an_empty_shard_is_no_end_and_no_fault(tmp_path, shuffle_shards):
    sizes = (3, 0, 2)
    numbers = iter(range(5))
    infos = [
        write_token_shard(tmp_path, i, [token_document(next(numbers), "a", 4, 16) for _ in range(n)], VOCABULARY)
        for i, n in enumerate(sizes)
    ]
    finish_tokens(tmp_path, infos, VOCABULARY, "t", "i")
    stream = stream_of(Source("a", TokenShards(tmp_path)), shuffle_shards=shuffle_shards, lanes=1)
    delivered = [number for step in range(3) for number in documents_in(stream.batch(step))]
    waiting = [number for _, number, _ in stream.state()["lane_states"]["0"]["waiting"]]
    assert len(delivered) + len(waiting) == stream.state()["lane_states"]["0"]["taken"]["a"]
    assert set(delivered) == set(range(5))


def test_another_seed_gives_other_batches(shards):
    one, other = (stream_of(Source("a", shards(40)), seed=seed).batch(0) for seed in (0, 1))
    assert not torch.equal(one["tokens"], other["tokens"])


def test_padding_is_small(shards):
    stream = stream_of(Source("a", shards(200)), sequence_length=256)
    padding = []
    for step in range(20):
        stream.batch(step)
        padding.append(stream.counts.padding)
    assert np.mean(padding) < 0.01


def test_two_sources_are_mixed_by_tokens(shards):
    sources = [Source("a", shards(40), weight=3), Source("b", shards(30, "b", image=40), weight=1)]
    stream = stream_of(*sources, sequence_length=128)
    tokens = np.zeros(2)
    for step in range(60):
        stream.batch(step)
        tokens += stream.counts.by_source[:, 4:8].sum(axis=1)
        for lane in stream.state()["lane_states"].values():
            assert sum(lane["credit"].values()) == 0
            assert max(lane["credit"].values()) < 64 * ONE  # never farther behind than a document
    assert tokens[0] / tokens.sum() == pytest.approx(0.75, abs=0.02)


def test_a_source_added_later_gets_its_share_and_no_more(shards):
    a, b = Source("a", shards(40)), Source("b", shards(30, "b"))
    before = stream_of(a)
    for step in range(20):
        before.batch(step)
    after = stream_of(a, b)
    after.load(before.state())
    for step in range(20, 50):
        after.batch(step)
    for old, new in zip(before.state()["lane_states"].values(), after.state()["lane_states"].values(), strict=True):
        assert abs((new["taken"]["a"] - old["taken"]["a"]) - new["taken"]["b"]) < 12


def test_documents_longer_than_a_row_come_in_windows_and_are_counted(shards):
    source = Source("a", shards(20, image=40))
    stream = stream_of(source, sequence_length=48, objective=ObjectiveConfig(kind="causal"))
    found: dict[int, set[tuple[int, ...]]] = {}
    totals = np.zeros(len(COLUMNS), dtype=np.int64)
    for step in range(12):
        batch = stream.batch(step)
        totals += stream.counts.by_source[0]
        for tokens, document in zip(batch["tokens"].numpy(), batch["document"].numpy(), strict=True):
            for number in range(document.max() + 1):
                window = tokens[document == number][1:-1]
                kind = int(VOCABULARY.modality(window[:1])[0])
                assert len(set(VOCABULARY.modality(window))) == 1 or len(window) <= 46
                found.setdefault(kind, set()).add(tuple(window.tolist()))
    counts = dict(zip(COLUMNS, totals.tolist(), strict=True))
    whole = [source.tokens.tokens(i).tolist() for i in range(20)]
    long = [document for document in whole if len(document) > 46]
    assert long and counts["split_documents"] > 0
    waiting = [set(map(tuple, lane["waiting"])) for lane in stream.state()["lane_states"].values()]
    second_waits = sum(w == 1 and (name, n, 0) not in lane for lane in waiting for name, n, w in lane)
    assert counts["sequences"] - counts["documents"] == counts["split_documents"] - second_waits
    for document in long:
        cut = document.index(VOCABULARY.brk)
        assert tuple(document[:cut]) in found[1] and tuple(document[cut + 1 :]) in found[2]


def test_shares_may_change_with_the_step(shards):
    sources = [Source("a", shards(40), weight={0: 1, 20: 0}), Source("b", shards(30, "b"), weight={0: 0, 20: 1})]
    stream = stream_of(*sources, lookahead=2)
    share = []
    for step in range(40):
        stream.batch(step)
        tokens = stream.counts.by_source[:, 4:8].sum(axis=1)
        share.append(tokens[0] / tokens.sum())
    assert share[0] == 1 and share[-1] == 0
    assert np.mean(share[6:14]) == pytest.approx(0.5, abs=0.15)  # what waits comes some rows later


@pytest.mark.parametrize(("workers", "depth"), [(1, 0), (3, 2)])
def test_processes_make_the_same_batches_and_states(shards, workers, depth):
    sources = [Source("a", shards(40)), Source("b", shards(17, "b"), weight=0.4)]
    straight = stream_of(*sources)
    for _ in range(3):
        straight.batch(_)
    resumed = stream_of(*sources)
    resumed.load(straight.state())
    with prefetch(resumed, range(3, 8), 1, 2, depth=depth, workers=workers) as batches:
        for step, batch, counts in batches:
            expected, expected_counts = straight.prepare(step, 1, 2)
            assert_same(expected, batch)
            assert (counts.by_source == expected_counts.by_source).all() and counts.padding == expected_counts.padding
            if step == 6:
                lanes = batches.state(6)["lane_states"]
                whole = straight.state(6)["lane_states"]
                assert lanes and all(whole[lane] == state for lane, state in lanes.items())


def test_an_error_of_a_process_surfaces_where_its_batch_would_have_come(shards):
    stream = stream_of(Source("a", shards(20, image=40)), sequence_length=32)
    with pytest.raises(UserError, match="does not fit"), prefetch(stream, range(3), workers=1) as batches:
        next(batches)


def test_a_killed_process_is_noticed(shards):
    stream = stream_of(Source("a", shards(40)))
    with prefetch(stream, range(1000), workers=1, depth=0) as batches:
        next(batches)
        (child,) = multiprocessing.active_children()
        child.kill()
        with pytest.raises(RuntimeError, match="ended by itself"):
            for _ in range(5):
                next(batches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed"),
        ({"lanes": 4}, "lanes"),
        ({"global_batch": 4}, "global_batch"),
        ({"sequence_length": 128}, "sequence_length"),
    ],
)
def test_a_state_of_another_stream_is_refused(shards, change, message):
    state = stream_of(Source("a", shards(40))).state()
    with pytest.raises(UserError, match=message):
        stream_of(Source("a", shards(40)), **change).load(state)


def test_changed_or_missing_sources_are_refused(shards):
    state = stream_of(Source("a", shards(40))).state()
    with pytest.raises(UserError, match="documents': 40"):
        stream_of(Source("a", shards(61))).load(state)
    with pytest.raises(UserError, match="does not have"):
        stream_of(Source("b", shards(40))).load(state)


def test_impossible_streams_are_refused(shards):
    source = Source("a", shards(40))
    with pytest.raises(UserError, match="different names"):
        stream_of(source, source)
    with pytest.raises(UserError, match="num_sentinels"):
        stream_of(source, objective=ObjectiveConfig(num_sentinels=17))
    with pytest.raises(UserError, match="cannot be shared"):
        stream_of(source).batch(0, 0, 9)
    with pytest.raises(UserError, match="weight"):
        Source("a", shards(40), weight=0)


def test_prefetched_batches_are_the_same_and_state_is_of_the_step_consumed(shards):
    stream, straight = stream_of(Source("a", shards(40))), stream_of(Source("a", shards(40)))
    with prefetch(stream, range(2, 8), depth=4) as batches:
        for step, batch, counts in batches:
            assert_same(batch, straight.batch(step))
            assert counts.tokens == straight.counts.tokens
            assert stream.state(step) == straight.state(step)
    assert step == 7


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_of_the_prefetch_thread_reaches_the_consumer(shards, depth):
    source = Source("a", shards(20, image=40))
    stream = stream_of(source, sequence_length=16, objective=ObjectiveConfig(order="image_first"))
    with pytest.raises(UserError, match="does not fit"), prefetch(stream, range(3), depth=depth) as batches:
        next(batches)


def test_leaving_the_block_stops_the_thread(shards):
    with prefetch(stream_of(Source("a", shards(40))), range(1000), depth=2) as batches:
        next(batches)
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())

"""The promise of the stream: the same global batches for any number of processes, workers and prefetched batches."""

import hashlib
import json
from contextlib import ExitStack

import numpy as np
import pytest

from mmtrain.config import ObjectiveConfig, RetrievalConfig, StreamConfig
from mmtrain.stream import COLUMNS, Source, Stream, merge_states, prefetch
from tests.stream.conftest import VOCABULARY, build_related

pytestmark = pytest.mark.slow
STEPS, ROWS = 300, 24
RETRIEVAL = RetrievalConfig(num_candidates=3, policy="uniform", dropout=0.2, max_score=1.0)


@pytest.fixture(scope="module")
def sources(shards, tmp_path_factory) -> list[Source]:
    """Three sources, one with retrieval, one with a scheduled share, one with documents longer than a row.

    All pass two epochs.
    """
    related = build_related(tmp_path_factory.mktemp("related"), 700, RETRIEVAL)
    return [
        Source("a", shards(700), neighbours=related, memory=shards(700)),
        Source("b", shards(211, "b"), weight={0: 0.2, 200: 0.6}),
        Source("long", shards(97, "c", image=60), weight=0.5),
    ]


def stream_of(sources: list[Source]) -> Stream:
    config = StreamConfig(sequence_length=72, global_batch=ROWS, lanes=24, lookahead=6)
    return Stream(sources, VOCABULARY, config, ObjectiveConfig(), RETRIEVAL, seed=5)


def digest(batches: list) -> str:
    """Hash of one global batch, given the shares of its ranks."""
    world = len(batches)
    whole = {name: np.empty((ROWS, 72), batches[0][name].numpy().dtype) for name in batches[0]}
    for rank, batch in enumerate(batches):
        for name, rows in batch.items():
            whole[name][rank::world] = rows.numpy()
    return hashlib.sha256(b"".join(whole[name].tobytes() for name in sorted(whole))).hexdigest()


def run(sources, start, end, world, workers, depth, state=None) -> tuple[list[str], dict]:
    """Hashes of the global batches of steps start..end-1 made by `world` ranks, and the state behind them."""
    with ExitStack() as stack:
        ranks = []
        for rank in range(world):
            stream = stream_of(sources)
            if state is not None:
                stream.load(state)
            ranks.append(stack.enter_context(prefetch(stream, range(start, end), rank, world, depth, workers)))
        hashes = []
        for step in range(start, end):
            got = [next(batches) for batches in ranks]
            assert {number for number, _, _ in got} == {step}
            hashes.append(digest([batch for _, batch, _ in got]))
        return hashes, json.loads(json.dumps(merge_states([batches.state(end - 1) for batches in ranks])))


@pytest.fixture(scope="module")
def straight(sources) -> list[str]:
    """The hashes of one process without workers or prefetching."""
    hashes, state = run(sources, 0, STEPS, world=1, workers=0, depth=0)
    taken = {name: sum(lane["taken"][name] for lane in state["lane_states"].values()) for name in ("a", "b", "long")}
    assert all(taken[source.name] > 2 * len(source.tokens) for source in sources), taken
    return hashes


@pytest.mark.parametrize(
    ("world", "workers", "depth"),
    [(3, 0, 2), *((world, workers, (world + workers) % 5) for world in (1, 2, 4, 8) for workers in (0, 1, 3))],
)
def test_batches_depend_on_seed_and_step_alone(sources, straight, world, workers, depth):
    hashes, _ = run(sources, 0, STEPS, world, workers, depth)
    assert hashes == straight


def test_twenty_resumes_with_another_number_of_processes_each_time(sources, straight):
    random = np.random.default_rng(0)
    stops = sorted(random.choice(np.arange(1, STEPS), 20, replace=False).tolist())
    hashes, state, start = [], None, 0
    for number, end in enumerate([*stops, STEPS]):
        world = [1, 8, 2, 4][number % 4]
        workers = 3 if number % 10 == 4 else 0
        part, state = run(sources, start, end, world, workers, depth=int(random.integers(5)), state=state)
        hashes += part
        start = end
    assert hashes == straight


def test_the_counts_add_up_to_what_was_taken(sources):
    """Documents delivered and those that wait are the documents that were taken, exactly."""
    stream = stream_of(sources)
    counts = np.zeros((3, len(COLUMNS)), dtype=np.int64)
    for step in range(100):
        stream.batch(step)
        counts += stream.counts.by_source
    state = stream.state()
    for number, source in enumerate(sources):
        lanes = state["lane_states"].values()
        waiting = sum(name == source.name and window == 0 for lane in lanes for name, _, window in lane["waiting"])
        taken = sum(lane["taken"][source.name] for lane in lanes)
        assert counts[number, COLUMNS.index("documents")] + waiting == taken
    assert len(json.dumps(state)) < 60_000

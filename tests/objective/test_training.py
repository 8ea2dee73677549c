import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.config import ObjectiveConfig, UserError
from mmtrain.config.randomness import random_stream
from mmtrain.objective import arrange, assemble, training_sequences, unrotate
from mmtrain.objective.assemble import split_windows
from mmtrain.tokens import Vocabulary
from tests.objective.conftest import training_sequence

V = Vocabulary(300, 50, 16)
TEXT, IMAGE, BREAK = V.text_start, V.image_start, V.brk


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=V.dtype)


def test_retrieved_documents_come_first_and_breaks_separate():
    tokens, num_retrieved = assemble(ids(10, BREAK, IMAGE), [ids(11), ids(12, 13)], V)
    assert tokens.tolist() == [V.eos, 11, BREAK, 12, 13, BREAK, 10, BREAK, IMAGE, V.eos]
    assert num_retrieved == 5 and tokens.dtype == V.dtype


def test_order_turns_pairs_and_nothing_else():
    rng = random_stream(0)
    pair, turned = ids(TEXT, TEXT, BREAK, IMAGE), ids(IMAGE, BREAK, TEXT, TEXT)
    assert arrange(pair, V, "image_first", rng).tolist() == turned.tolist()
    assert arrange(turned, V, "text_first", rng).tolist() == pair.tolist()
    assert {arrange(pair, V, "random", rng)[0] for _ in range(50)} == {TEXT, IMAGE}
    for other in (ids(TEXT), ids(TEXT, BREAK, TEXT), ids(IMAGE, BREAK, TEXT, BREAK, IMAGE)):
        assert arrange(other, V, "image_first", rng) is other


def test_causal_is_the_assembled_sequence():
    config = ObjectiveConfig(kind="causal", retrieved_loss_weight=0.1)
    sequence = training_sequence(ids(10, BREAK, IMAGE), [ids(11)], V, config, random_stream(0))
    assert sequence.tokens.tolist() == [V.eos, 11, BREAK, 10, BREAK, IMAGE, V.eos]
    assert sequence.loss_weight.tolist() == pytest.approx([0.1, 0.1, 1, 1, 1, 1, 0])
    assert sequence.retrieved == 2


@pytest.mark.parametrize(
    ("query", "retrieved", "weights"),
    [
        (ids(TEXT, TEXT, BREAK, IMAGE), [], [0.1, 0.1, 1, 1, 1, 0]),
        (ids(TEXT, TEXT), [], [1, 1, 1, 0]),  # alone: nothing else would be learned from it
        (ids(TEXT, BREAK, IMAGE), [ids(TEXT, TEXT)], [0.1, 0.1, 1, 1, 1, 1, 1, 0]),
    ],
)
def test_the_first_of_several_segments_weighs_what_is_configured(query, retrieved, weights):
    config = ObjectiveConfig(kind="causal", first_segment_loss_weight=0.1)
    sequence = training_sequence(query, retrieved, V, config, random_stream(0))
    assert sequence.loss_weight.tolist() == pytest.approx(weights)


def test_the_picture_comes_first_where_its_caption_is_masked():
    config = ObjectiveConfig(
        masks="fixed", num_masks=1, whole_segment_probability=1.0, whole_segments="text", first_segment_loss_weight=0.1
    )
    sequence = training_sequence(ids(TEXT, TEXT, BREAK, IMAGE, IMAGE), [], V, config, random_stream(0))
    weighs_less = sequence.tokens[1:][sequence.loss_weight[:-1] < 1]
    assert weighs_less.tolist() == [IMAGE, IMAGE] and sequence.num_masks == 1


@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 3), st.integers(65, 120), st.integers(0, 50))
@settings(deadline=None)
def test_a_sequence_fits_and_gives_up_neighbours_first(text, image, retrieved, limit, seed):
    query = np.concatenate([np.full(text, TEXT), [BREAK], np.full(image, IMAGE)]).astype(V.dtype)
    config = ObjectiveConfig(num_masks=3)
    sequence = training_sequence(query, [query] * retrieved, V, config, random_stream(seed), limit)
    assert len(sequence) <= limit and sequence.num_windows == 1
    plain = unrotate(sequence.tokens, V)
    assert plain[-len(query) - 1 : -1].tolist() == query.tolist()
    assert len(plain) == 2 + len(query) + (retrieved - sequence.dropped_retrieved) * (len(query) + 1)


SEGMENTS = st.lists(st.tuples(st.booleans(), st.integers(1, 30)), min_size=1, max_size=12)


@given(SEGMENTS, st.integers(30, 60))
def test_windows_hold_every_segment_once_and_never_a_part_of_a_picture(segments, limit):
    pieces = [np.full(n, IMAGE + 1 if is_image else TEXT + 1, V.dtype) + i for i, (is_image, n) in enumerate(segments)]
    document = np.concatenate([part for piece in pieces for part in (piece, ids(BREAK))][:-1])
    windows = split_windows(document, V, limit)
    assert all(0 < len(window) <= limit for window in windows)
    found = [part for window in windows for part in np.split(window, np.flatnonzero(window == BREAK))]
    assert [part[part != BREAK].tolist() for part in found] == [piece.tolist() for piece in pieces]
    lengths = [len(window) for window in windows]
    firsts = [len(np.split(window, np.flatnonzero(window == BREAK))[0]) for window in windows[1:]]
    assert all(length + 1 + first > limit for length, first in zip(lengths, firsts, strict=False))  # each is full


def test_only_a_text_longer_than_a_window_is_cut():
    document = ids(IMAGE, BREAK, *range(TEXT, TEXT + 7), BREAK, IMAGE)
    windows = [window.tolist() for window in split_windows(document, V, 5)]
    assert windows == [[IMAGE], list(range(TEXT, TEXT + 5)), [TEXT + 5, TEXT + 6, BREAK, IMAGE]]


def test_every_window_of_a_long_document_is_a_sequence_with_its_neighbours():
    query = np.concatenate([np.full(20, TEXT), [BREAK], np.full(16, IMAGE), [BREAK], np.full(20, TEXT)]).astype(V.dtype)
    sequences = training_sequences(query, [ids(TEXT, TEXT)], V, ObjectiveConfig(masks="none"), random_stream(0), 30)
    assert [(len(s), s.window, s.num_windows, s.retrieved) for s in sequences] == [
        (25, 0, 3, 3), (21, 1, 3, 3), (25, 2, 3, 3)
    ]  # fmt: skip


def test_a_picture_longer_than_the_row_is_the_users_error():
    with pytest.raises(UserError, match="stream.sequence_length"):
        training_sequence(np.full(30, IMAGE, dtype=V.dtype), [], V, ObjectiveConfig(), random_stream(0), 20)

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.config import ObjectiveConfig
from mmtrain.config.randomness import random_stream
from mmtrain.objective import assemble, cm3, unrotate
from mmtrain.tokens import Vocabulary
from tests.objective.conftest import training_sequence

VOCABULARY = Vocabulary(300, 50, 16)


@st.composite
def documents(draw) -> np.ndarray:
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
    pieces = []
    for i, length in enumerate(lengths):
        low, high = (
            (VOCABULARY.text_start, VOCABULARY.text_end)
            if draw(st.booleans())
            else (VOCABULARY.image_start, VOCABULARY.image_end)
        )
        ids = draw(st.lists(st.integers(low, high - 1), min_size=length, max_size=length))
        pieces += [[VOCABULARY.brk]] * (i > 0) + [ids]
    return np.concatenate(pieces).astype(VOCABULARY.dtype)


configs = st.builds(
    ObjectiveConfig,
    masks=st.sampled_from(["poisson", "fixed", "none"]),
    num_masks=st.floats(0, 6),
    min_masks=st.integers(0, 3),
    num_sentinels=st.integers(3, 16),
    whole_segment_probability=st.sampled_from([0.0, 0.5, 1.0]),
    span_policy=st.sampled_from(["clip", "segment"]),
)


def masked_spans(tokens: np.ndarray) -> list[list[int]]:
    end = np.flatnonzero(tokens == VOCABULARY.eos)[-1] + 1
    stops = np.flatnonzero(tokens == VOCABULARY.eoss)
    starts = [end, *(stops[:-1] + 1)]
    return [tokens[start + 1 : stop].tolist() for start, stop in zip(starts, stops, strict=False)]


@given(documents(), st.lists(documents(), max_size=2), configs, st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_masking_moves_tokens_and_loses_none(query, retrieved, config, seed):
    tokens, num_retrieved = assemble(query, retrieved, VOCABULARY)
    sequence = cm3(tokens, num_retrieved, VOCABULARY, config, random_stream(seed))

    assert np.array_equal(unrotate(sequence.tokens, VOCABULARY), tokens)
    assert len(sequence) == len(tokens) + 3 * sequence.num_masks
    counts = np.bincount(sequence.tokens, minlength=VOCABULARY.size)
    expected = np.bincount(tokens, minlength=VOCABULARY.size)
    sentinels = slice(VOCABULARY.sentinel_start, VOCABULARY.sentinel_end)
    assert counts[sentinels].tolist() == [2] * sequence.num_masks + [0] * (16 - sequence.num_masks)
    assert counts[VOCABULARY.eoss] == sequence.num_masks <= config.num_sentinels
    counts[sentinels] = counts[VOCABULARY.eoss] = 0
    assert np.array_equal(counts, expected)


@given(documents(), st.lists(documents(), max_size=2), configs, st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_no_span_is_empty_or_holds_a_boundary(query, retrieved, config, seed):
    tokens, num_retrieved = assemble(query, retrieved, VOCABULARY)
    sequence = cm3(tokens, num_retrieved, VOCABULARY, config, random_stream(seed))
    spans = masked_spans(sequence.tokens)
    assert len(spans) == sequence.num_masks
    assert all(span and not {VOCABULARY.brk, VOCABULARY.eos} & set(span) for span in spans)


@given(documents(), st.lists(documents(), max_size=2), st.integers(1, 6), st.integers(0, 1000))
@settings(deadline=None)
def test_whole_segment_probability_one_masks_exactly_whole_segments(query, retrieved, num_masks, seed):
    tokens, num_retrieved = assemble(query, retrieved, VOCABULARY)
    config = ObjectiveConfig(masks="fixed", num_masks=num_masks, whole_segment_probability=1.0)
    sequence = cm3(tokens, num_retrieved, VOCABULARY, config, random_stream(seed))
    segments = [run[1:].tolist() for run in np.split(tokens, np.flatnonzero(tokens <= VOCABULARY.brk)) if len(run) > 1]
    spans = masked_spans(sequence.tokens)
    assert len(spans) == min(num_masks, len(segments))
    for span in spans:
        segments.remove(span)


def pair(text_length: int = 10, image_length: int = 40) -> np.ndarray:
    text = np.arange(VOCABULARY.text_start, VOCABULARY.text_start + text_length)
    image = np.arange(VOCABULARY.image_start, VOCABULARY.image_start + image_length)
    return np.concatenate([text, [VOCABULARY.brk], image]).astype(VOCABULARY.dtype)


def masked_modalities(config: ObjectiveConfig, n: int = 1000) -> np.ndarray:
    """Shares of (no mask, text, image) over n sequences of one pair."""
    counts = np.zeros(3)
    for i in range(n):
        spans = masked_spans(training_sequence(pair(), [], VOCABULARY, config, random_stream(i)).tokens)
        counts[VOCABULARY.modality(np.array(spans[0]))[0] if spans else 0] += 1
    return counts / n


def test_poisson_masks_leave_a_third_of_the_sequences_plain():
    assert masked_modalities(ObjectiveConfig())[0] == pytest.approx(np.exp(-1), abs=0.05)


def test_clipped_spans_fall_in_long_segments_and_segment_spans_in_all_alike():
    config = {"masks": "fixed", "whole_segment_probability": 0.0}
    assert masked_modalities(ObjectiveConfig(span_policy="clip", **config))[1] < 0.15
    assert masked_modalities(ObjectiveConfig(span_policy="segment", **config))[1] == pytest.approx(0.5, abs=0.06)


def test_masks_fall_in_retrieved_documents_and_in_the_query():
    config = ObjectiveConfig(masks="fixed")
    first_masked = [
        bool(sequence.is_retrieved[-1])
        for i in range(400)
        for sequence in [training_sequence(pair(), [pair()], VOCABULARY, config, random_stream(i))]
    ]
    assert np.mean(first_masked) == pytest.approx(0.5, abs=0.1)


def test_loss_weights_follow_the_targets():
    config = ObjectiveConfig(
        masks="fixed", whole_segment_probability=1.0, num_masks=2, min_masks=2,
        sentinel_loss_weight=0.25, retrieved_loss_weight=0.1, image_loss_weight=0.5,
    )  # fmt: skip
    tokens, num_retrieved = assemble(pair(3, 4), [pair(2, 2)], VOCABULARY)
    sequence = cm3(tokens, num_retrieved, VOCABULARY, config, random_stream(5))
    v, own = VOCABULARY, unrotate(sequence.tokens, VOCABULARY)
    assert np.array_equal(own, tokens) and sequence.loss_weight[-1] == 0
    expected = []
    for target, retrieved in zip(sequence.tokens[1:].tolist(), sequence.is_retrieved[1:].tolist(), strict=True):
        is_sentinel, is_image = target >= v.sentinel_start, v.image_start <= target < v.image_end
        expected.append((0.25 if is_sentinel else 0.5 if is_image else 1.0) * (0.1 if retrieved else 1.0))
    assert sequence.loss_weight[:-1].tolist() == pytest.approx(expected)
    assert {0.25, 0.5, 1.0} <= {round(weight, 6) for weight in expected}
    # masks carry the mark along: 2 + 1 + 2 tokens and the <break> after them, three more for each mask inside
    assert sequence.retrieved in {6, 9, 12}


DIGEST = """
import hashlib, numpy as np
from mmtrain.config import ObjectiveConfig
from mmtrain.config.randomness import random_stream
from tests.objective.conftest import training_sequence
from mmtrain.tokens import Vocabulary
document = np.arange(6, 90, dtype=np.uint16)
digest = hashlib.sha256()
for i in range(50):
    sequence = training_sequence(document, [], Vocabulary(300, 50, 16), ObjectiveConfig(), random_stream("x", 1, i))
    digest.update(sequence.tokens.tobytes())
print(digest.hexdigest())
"""


def test_the_same_key_gives_the_same_sequence_in_another_process():
    document = np.arange(6, 90, dtype=np.uint16)
    digest = hashlib.sha256()
    for i in range(50):
        sequence = training_sequence(document, [], VOCABULARY, ObjectiveConfig(), random_stream("x", 1, i))
        digest.update(sequence.tokens.tobytes())
    other = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True).stdout.strip()
    assert other == digest.hexdigest()

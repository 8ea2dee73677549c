import numpy as np
import pytest

from mmtrain.objective import caption_prompt, positions, text_to_image_prompt, unconditional_image_prompt
from mmtrain.tokens import Vocabulary

VOCABULARY = Vocabulary(text_size=300, image_codes=64, num_sentinels=4)
PICTURE = VOCABULARY.image_start + np.arange(16)


def caption(length):
    return VOCABULARY.text_start + np.arange(length)


def test_without_alignment_positions_count_tokens():
    assert positions(np.concatenate([caption(3), PICTURE]), VOCABULARY, 0).tolist() == list(range(19))


@pytest.mark.parametrize("length", [1, 5, 6, 7, 12])
def test_a_picture_starts_at_a_multiple_behind_captions_of_any_length(length):
    v = VOCABULARY
    pairs = [[v.eos], caption(length), [v.brk], PICTURE, [v.brk], caption(2), [v.brk], PICTURE, [v.eos]]
    tokens = np.concatenate(pairs)
    found = positions(tokens, v, 8)
    starts = [length + 2, length + 2 + 16 + 4]
    assert all(found[start] % 8 == 0 for start in starts)
    assert np.diff(found).min() == 1 and (np.diff(found) > 1).sum() <= 2
    assert found[-1] < len(tokens) + 2 * 8


def test_the_rest_of_a_picture_behind_a_masked_span_does_not_jump():
    v = VOCABULARY
    tokens = np.concatenate([[v.eos], caption(1), [v.brk], PICTURE[:4], [v.sentinel_start], PICTURE[8:], [v.eos]])
    assert (np.diff(positions(tokens, v, 8))[3:] == 1).all()


def test_every_prompt_puts_the_picture_where_training_did():
    v = VOCABULARY
    for length in (2, 9):
        trained = np.concatenate([[v.eos], caption(length), [v.brk], PICTURE, [v.eos]])
        prompt = text_to_image_prompt(caption(length), [], v)
        sampled = positions(np.append(prompt, v.image_start), v, 16)
        assert np.array_equal(sampled, positions(trained, v, 16)[: len(prompt) + 1])
    for prompt in (unconditional_image_prompt([], v), caption_prompt(PICTURE, [], v)):
        found = positions(np.append(prompt, PICTURE[0] if prompt[-1] == v.brk else v.text_start), v, 16)
        assert found[3] == 16

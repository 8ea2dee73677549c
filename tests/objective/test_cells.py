import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmtrain.config import ObjectiveConfig
from mmtrain.objective import NO_CELL, assemble, cm3, picture_cells, unconditional_image_prompt
from mmtrain.tokens import Vocabulary

VOCABULARY = Vocabulary(text_size=300, image_codes=64, num_sentinels=4)
PICTURE = VOCABULARY.image_start + np.arange(16)


def caption(length):
    return VOCABULARY.text_start + np.arange(length)


def test_every_picture_counts_from_0_and_nothing_else_counts():
    v = VOCABULARY
    tokens = np.concatenate([[v.eos], caption(3), [v.brk], PICTURE, [v.brk], PICTURE, [v.brk], caption(2), [v.eos]])
    cells = picture_cells(tokens, v)
    assert cells.dtype == np.int32
    assert cells.tolist() == [NO_CELL] * 5 + [*range(16), NO_CELL, *range(16)] + [NO_CELL] * 4
    assert picture_cells(PICTURE, v).tolist() == [*range(16)]
    assert picture_cells(tokens[:0], v).tolist() == []
    assert (picture_cells(unconditional_image_prompt([], v), v) == NO_CELL).all()


@given(st.integers(0, 2**32), st.floats(0, 1))
def test_a_mask_moves_cells_with_their_tokens(seed, whole):
    v = VOCABULARY
    query = np.concatenate([caption(6), [v.brk], PICTURE])  # the code of a cell is its number
    tokens, num_retrieved = assemble(query, [np.concatenate([PICTURE, [v.brk], caption(4)])], v)
    config = ObjectiveConfig(whole_segment_probability=whole, num_masks=2.0)
    sequence = cm3(tokens, num_retrieved, v, config, np.random.default_rng(seed))
    is_image = (sequence.tokens >= v.image_start) & (sequence.tokens < v.image_end)
    assert (sequence.cell[is_image] == sequence.tokens[is_image] - v.image_start).all()
    assert (sequence.cell[~is_image] == NO_CELL).all()
    assert is_image.sum() == 32


@given(st.integers(0, 2**32))
def test_whole_segments_of_text_leave_pictures_alone(seed):
    v = VOCABULARY
    config = ObjectiveConfig(whole_segment_probability=1.0, whole_segments="text", masks="fixed", num_masks=2)
    tokens, num_retrieved = assemble(np.concatenate([caption(6), [v.brk], PICTURE]), [], v)
    masked = cm3(tokens, num_retrieved, v, config, np.random.default_rng(seed))
    source = [v.eos, v.sentinel_start, v.brk, *PICTURE, v.eos]
    assert masked.tokens.tolist() == [*source, v.sentinel_start, *caption(6), v.eoss]
    picture_alone, _ = assemble(PICTURE, [], v)
    assert cm3(picture_alone, 0, v, config, np.random.default_rng(seed)).num_masks == 0

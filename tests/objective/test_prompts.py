import numpy as np
import pytest

from mmtrain.config import ObjectiveConfig, UserError
from mmtrain.config.randomness import random_stream
from mmtrain.objective import (
    NO_CELL,
    assemble,
    caption_prompt,
    infill_prompt,
    pair,
    picture_cells,
    rotate,
    text_to_image_prompt,
    unconditional_image_prompt,
)
from mmtrain.tokens import Vocabulary
from tests.objective.conftest import training_sequence

V = Vocabulary(300, 50, 16)
CAPTION = np.array([10, 11, 12])
IMAGE = np.arange(V.image_start, V.image_start + 4)
PAIR = np.concatenate([CAPTION, [V.brk], IMAGE])
S0 = V.sentinel_start


def trained(document: np.ndarray, retrieved: list[np.ndarray], order: str, whole: float) -> list[list[int]]:
    """Sequences that training makes of a document."""
    config = ObjectiveConfig(whole_segment_probability=whole, masks="poisson", order=order)
    return [training_sequence(document, retrieved, V, config, random_stream(i)).tokens.tolist() for i in range(400)]


def begins_one(wanted: list[int], sequences: list[list[int]]) -> bool:
    return any(sequence[: len(wanted)] == wanted for sequence in sequences)


def test_layouts_are_those_of_the_recipe():
    prefix = [V.eos, *PAIR, V.brk]
    assert text_to_image_prompt(CAPTION, [], V).tolist() == [V.eos, *CAPTION, V.brk]
    assert text_to_image_prompt(CAPTION, [PAIR], V).tolist() == [*prefix, *CAPTION, V.brk]
    assert unconditional_image_prompt([], V).tolist() == [V.eos, S0, V.brk]
    assert unconditional_image_prompt([PAIR], V).tolist() == prefix
    assert caption_prompt(IMAGE, [], V).tolist() == [V.eos, S0, V.brk, *IMAGE, V.eos, S0]
    assert caption_prompt(IMAGE, [PAIR], V).tolist() == [*prefix, S0, V.brk, *IMAGE, V.eos, S0]
    question = caption_prompt(IMAGE, [], V, words_before=CAPTION)
    assert question.tolist() == [V.eos, *CAPTION, S0, V.brk, *IMAGE, V.eos, S0]


@pytest.mark.parametrize("order", ["text_first", "image_first"])
def test_every_prompt_begins_a_sequence_that_training_makes(order: str):
    for retrieved in ([], [PAIR]):
        sequences = trained(PAIR, retrieved, order, whole=1.0)
        documents = [pair(CAPTION, IMAGE, V, order) for _ in retrieved]
        image = text_to_image_prompt(CAPTION, documents, V, order).tolist() + IMAGE.tolist()
        # With documents the unconditional prompt is the recipe's, and the picture follows no caption.
        follows = [] if documents and order == "text_first" else IMAGE.tolist()
        nothing = unconditional_image_prompt(documents, V, order).tolist() + follows
        stop = V.eos if order == "image_first" else V.eoss
        caption = [*caption_prompt(IMAGE, documents, V, order).tolist(), *CAPTION.tolist(), stop]
        for wanted in (image, nothing, caption):
            assert begins_one(wanted, sequences), wanted
    spans = trained(PAIR, [], order, whole=0.0)
    answer = [*caption_prompt(IMAGE, [], V, order, CAPTION[:1]).tolist(), *CAPTION[1:].tolist(), stop]
    assert begins_one(answer, spans if order == "text_first" else trained(PAIR, [], order, 1.0))
    place = 0 if order == "image_first" else 4
    prompt, _ = infill_prompt(pair(CAPTION, IMAGE, V, order), [(place + 1, place + 3)], [], V)
    assert begins_one([*prompt.tolist(), *IMAGE[1:3].tolist(), V.eoss], spans)


@pytest.mark.parametrize("retrieved", [[], [PAIR]])
def test_an_infill_prompt_is_the_rotated_sequence_up_to_its_first_span(retrieved: list[np.ndarray]):
    spans = [(0, 2), (5, 6), (7, 8)]
    tokens, offset = assemble(PAIR, retrieved, V)
    starts, ends = np.array(spans).T + 1 + offset
    sentinels, closings, outside = S0 + np.arange(3), np.full(3, V.eoss), np.full(3, NO_CELL)
    rotated = rotate(tokens, starts, ends, sentinels, closings)
    prompt, cells = infill_prompt(PAIR, spans, retrieved, V)
    assert prompt.dtype == V.dtype and prompt.tolist() == rotated[: len(prompt)].tolist()
    assert prompt[-2:].tolist() == [V.eos, S0] and rotated[len(prompt) :].tolist()[:2] == CAPTION[:2].tolist()
    expected = rotate(picture_cells(tokens, V), starts, ends, outside, outside)
    assert cells.tolist() == expected[: len(prompt)].tolist()
    assert cells[prompt == IMAGE[2]].tolist()[-1] == 2  # where it stood, though a code before it is masked


def test_more_spans_than_sentinels_are_refused():
    with pytest.raises(UserError, match="17 masked spans need as many sentinels, and the vocabulary has 16"):
        infill_prompt(np.arange(6, 60), [(3 * i, 3 * i + 1) for i in range(17)], [], V)

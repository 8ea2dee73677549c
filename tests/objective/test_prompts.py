import numpy as np

from mmtrain.config import ObjectiveConfig
from mmtrain.config.randomness import random_stream
from mmtrain.objective import caption_prompt, text_to_image_prompt, unconditional_image_prompt
from mmtrain.tokens import Vocabulary
from tests.objective.conftest import training_sequence

V = Vocabulary(300, 50, 16)
CAPTION = np.array([10, 11, 12])
IMAGE = np.arange(V.image_start, V.image_start + 4)
PAIR = np.concatenate([CAPTION, [V.brk], IMAGE])
S0 = V.sentinel_start


def trained(retrieved: list[np.ndarray]) -> set[tuple[int, ...]]:
    """Sequences that training makes of the pair."""
    config = ObjectiveConfig(whole_segment_probability=1.0, masks="poisson")
    return {tuple(training_sequence(PAIR, retrieved, V, config, random_stream(i)).tokens.tolist()) for i in range(200)}


def test_layouts_are_those_of_the_recipe():
    prefix = [V.eos, *PAIR, V.brk]
    assert text_to_image_prompt(CAPTION, [], V).tolist() == [V.eos, *CAPTION, V.brk]
    assert text_to_image_prompt(CAPTION, [PAIR], V).tolist() == [*prefix, *CAPTION, V.brk]
    assert unconditional_image_prompt([], V).tolist() == [V.eos, S0, V.brk]
    assert unconditional_image_prompt([PAIR], V).tolist() == prefix
    assert caption_prompt(IMAGE, [], V).tolist() == [V.eos, S0, V.brk, *IMAGE, V.eos, S0]
    assert caption_prompt(IMAGE, [PAIR], V).tolist() == [*prefix, S0, V.brk, *IMAGE, V.eos, S0]


def test_every_prompt_begins_a_sequence_that_training_makes():
    for retrieved in ([], [PAIR]):
        sequences = trained(retrieved)
        image = text_to_image_prompt(CAPTION, retrieved, V).tolist() + IMAGE.tolist()
        nothing = unconditional_image_prompt(retrieved, V).tolist() + ([] if retrieved else IMAGE.tolist())
        caption = [*caption_prompt(IMAGE, retrieved, V).tolist(), *CAPTION.tolist(), V.eoss]
        for wanted in (image, nothing, caption):
            assert any(list(sequence[: len(wanted)]) == wanted for sequence in sequences)

"""Sampling: the grammar holds, seeds decide, and neither batch nor padding shows."""

import numpy as np
import pytest
import torch

from mmtrain.config import ModelConfig, UserError
from mmtrain.generate import SamplingSettings, sample_tokens
from mmtrain.generate.sampling import choose
from mmtrain.models import Decoder, build_model

VOCABULARY, POSITIONS = 64, 48
IMAGE = slice(20, 50)
LENGTH = 12


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = ModelConfig(layers=2, width=32, heads=2, init_std=0.3, position_init_std=0.3, zero_init_outputs=False)
    model = build_model(config, VOCABULARY, POSITIONS)
    model.initialize(1)
    return model.eval()


def allowed(ids: slice = IMAGE, *more: int) -> np.ndarray:
    admitted = np.zeros(VOCABULARY, dtype=bool)
    admitted[ids] = True
    admitted[list(more)] = True
    return admitted


PROMPTS = [np.array(ids) for ids in ([1, 7], [1, 3, 9, 4, 11, 2, 8], [5], [1, 7, 7, 12])]
BLANK = [np.array([1, 0])] * len(PROMPTS)


def draw(model: Decoder, prompts, unconditional=None, seeds=None, settings=None, **changes) -> np.ndarray:
    arguments = {"allowed": allowed(), "length": LENGTH, "stop": None} | changes
    seeds = [(0, i) for i in range(len(prompts))] if seeds is None else seeds
    settings = SamplingSettings() if settings is None else settings
    return sample_tokens(model, prompts, unconditional, seeds=seeds, settings=settings, **arguments)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_exactly_the_length_and_only_admitted_ids(model: Decoder, guidance: float) -> None:
    ids = draw(model, PROMPTS, BLANK, settings=SamplingSettings(guidance=guidance))
    assert ids.shape == (len(PROMPTS), LENGTH)
    assert ((ids >= IMAGE.start) & (ids < IMAGE.stop)).all()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_sample_is_the_same_alone_and_in_a_batch(model: Decoder, guidance: float) -> None:
    """The prompts differ in length, so this also says that padding does not show."""
    settings = SamplingSettings(guidance=guidance)
    together = draw(model, PROMPTS, BLANK, settings=settings)
    for i, prompt in enumerate(PROMPTS):
        alone = draw(model, [prompt], [BLANK[i]], seeds=[(0, i)], settings=settings)
        assert np.array_equal(alone[0], together[i])


def test_the_seed_decides(model: Decoder) -> None:
    first, second = (draw(model, PROMPTS[:1], seeds=[(seed, "image", 0)]) for seed in (1, 2))
    assert np.array_equal(first, draw(model, PROMPTS[:1], seeds=[(1, "image", 0)]))
    assert not np.array_equal(first, second)


def test_two_samples_of_a_prompt_differ(model: Decoder) -> None:
    ids = draw(model, [PROMPTS[0]] * 2)
    assert not np.array_equal(ids[0], ids[1])


def test_guidance_1_is_no_guidance(model: Decoder) -> None:
    assert np.array_equal(draw(model, PROMPTS, BLANK), draw(model, PROMPTS, None))


def test_greedy_guided_ids_are_those_of_the_formula(model: Decoder) -> None:
    """Each id recomputed from the logits of both whole sequences, without cache or padding."""
    guidance = 2.5
    prompt, blank = PROMPTS[1], BLANK[1]
    ids = draw(model, PROMPTS, BLANK, settings=SamplingSettings(temperature=0, guidance=guidance))[1]

    def logits_after(tokens: np.ndarray) -> torch.Tensor:
        row = torch.tensor(tokens)[None]
        position, no_cell = torch.arange(len(tokens))[None], torch.full_like(row, -1)
        return model.logits(row, torch.zeros_like(row), position, no_cell)[0, -1]

    for step in range(LENGTH):
        with torch.inference_mode():
            conditional = logits_after(np.append(prompt, ids[:step]))
            unconditional = logits_after(np.append(blank, ids[:step]))
        guided = unconditional + guidance * (conditional - unconditional)
        guided[~torch.tensor(allowed())] = float("-inf")
        assert ids[step] == int(guided.argmax())


def test_a_picture_is_drawn_in_the_cells_that_training_gives_it() -> None:
    """Rotary positions and rows and columns, with a picture in the prompt and prompts of different lengths."""
    settings = {"init_std": 0.3, "position_init_std": 0.3, "zero_init_outputs": False, "picture_grid": 4}
    model = build_model(ModelConfig("chameleon", 2, 32, 2, **settings), VOCABULARY, POSITIONS).eval()
    model.initialize(2)
    seen = np.array([1, 3, *range(20, 36), 4])
    cells = [np.array([-1, -1, *range(16), -1]), np.full(2, -1)]
    greedy = SamplingSettings(temperature=0)
    ids = draw(model, [seen, PROMPTS[0]], settings=greedy, cells=cells, draws_picture=True)
    for prompt, cell, drawn in zip([seen, PROMPTS[0]], cells, ids, strict=True):
        tokens = torch.tensor(np.append(prompt, drawn))[None]
        cell = torch.tensor(np.append(cell, np.arange(LENGTH)))[None]
        with torch.inference_mode():
            logits = model.logits(tokens, torch.zeros_like(tokens), torch.arange(tokens.shape[1])[None], cell)[0]
        logits = logits.masked_fill(~torch.tensor(allowed()), float("-inf"))
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == drawn.tolist()


def test_temperature_0_is_greedy_whatever_the_seed(model: Decoder) -> None:
    greedy = SamplingSettings(temperature=0)
    first = draw(model, PROMPTS, seeds=[(1, i) for i in range(4)], settings=greedy)
    assert np.array_equal(first, draw(model, PROMPTS, seeds=[(2, i) for i in range(4)], settings=greedy))


def test_a_row_ends_at_its_stop_and_the_others_go_on(model: Decoder) -> None:
    stop = 60
    words = allowed(slice(6, 12), stop)
    prompts = [PROMPTS[i % 4] for i in range(16)]
    ids = draw(model, prompts, allowed=words, stop=stop, length=30)
    ends = [int(np.argmax(row == stop)) if (row == stop).any() else 30 for row in ids]
    assert 0 < min(ends) < max(ends)
    for row, end in zip(ids, ends, strict=True):
        assert (row[end:] == stop).all()
        assert ((row[:end] >= 6) & (row[:end] < 12)).all()


def test_a_prompt_that_is_too_long_is_a_sentence(model: Decoder) -> None:
    with pytest.raises(UserError, match="40 tokens and 12 new ones exceed the model's 48 positions"):
        draw(model, [np.ones(40, dtype=np.int64)])


def test_all_positions_can_be_used(model: Decoder) -> None:
    assert draw(model, [np.ones(POSITIONS - LENGTH, dtype=np.int64)]).shape == (1, LENGTH)


def test_draws_follow_the_probabilities_of_the_nucleus() -> None:
    probability = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    logits = probability.log().expand(20_000, 4)
    everything = torch.ones(4, dtype=torch.bool)

    def shares(allowed: torch.Tensor, settings: SamplingSettings) -> list[float]:
        return (torch.bincount(choose(logits, allowed, uniform, settings), minlength=4) / 20_000).tolist()

    assert shares(everything, SamplingSettings(top_p=1.0)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=1e-3)
    # The smallest set that holds at least 0.7 of the probability.
    assert shares(everything, SamplingSettings(top_p=0.7)) == pytest.approx([0.625, 0.375, 0, 0], abs=1e-3)
    assert shares(everything, SamplingSettings(top_p=0.0)) == [1, 0, 0, 0]
    without_first = torch.tensor([False, True, True, True])
    assert shares(without_first, SamplingSettings(top_p=1.0)) == pytest.approx([0, 0.6, 0.3, 0.1], abs=1e-3)
    hot = (probability**0.5 / (probability**0.5).sum()).tolist()
    assert shares(everything, SamplingSettings(temperature=2.0, top_p=1.0)) == pytest.approx(hot, abs=1e-3)


def test_the_largest_draw_stays_inside_the_nucleus() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.7, 0.2]]))
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    chosen = choose(logits, torch.ones(3, dtype=torch.bool), almost_one, SamplingSettings(top_p=0.75))
    assert chosen.item() == 2

"""Sampling: seeds decide, neither batch nor padding nor cache shows, and guidance is its formula."""

import dataclasses

import numpy as np
import pytest
import torch

from mmtrain.config import ModelConfig, UserError
from mmtrain.generate import Grammar, Prompt, Sampled, SamplingSettings, check, sample, score
from mmtrain.generate.drawing import draw, nucleus
from mmtrain.generate.guidance import contrasted, guided
from mmtrain.models import Decoder, build_model
from mmtrain.models.linear import linear
from mmtrain.objective import picture_cells
from mmtrain.tokens import Vocabulary

V = Vocabulary(text_size=30, image_codes=20, num_sentinels=4)
GRID, POSITIONS = 4, 72
CELLS = np.arange(GRID**2)
PICTURE = np.arange(V.image_start, V.image_start + GRID**2)
BLANK = np.array([V.eos, V.sentinel_start, V.brk])
GREEDY = SamplingSettings(temperature=0)
GUIDED = SamplingSettings(guidance=3.0, retrieval_guidance=1.5, guidance_schedule="cosine", top_p=0.9)
CONTRASTIVE = SamplingSettings(contrastive_k=3, contrastive_alpha=0.3, top_k=9)


@pytest.fixture(scope="module", params=["chameleon", "cm3leon"])
def model(request: pytest.FixtureRequest) -> Decoder:
    config = ModelConfig(request.param, 2, 32, 4, kv_heads=2, init_std=0.3, position_init_std=0.3, picture_grid=GRID)
    config.zero_init_outputs = False
    model = build_model(config, V.size, POSITIONS)
    model.initialize(1)
    return model.eval()


def words(*ids: int) -> np.ndarray:
    return np.array([V.eos, *(V.text_start + id for id in ids), V.brk])


def tasks() -> list[Prompt]:
    """Pictures with one to three streams, a caption, an infilled picture and a free text: lengths 3 to 24."""
    retrieved, full = words(9, 9, 9, 4), words(9, 9, 9, 4, 1, 2)
    caption = np.array([V.eos, V.sentinel_start, V.brk, *PICTURE, V.eos, V.sentinel_start])
    holed = np.array([V.eos, 8, V.brk, V.sentinel_start, *PICTURE[4:], V.eos, V.sentinel_start])
    holed_cells = picture_cells(holed, V) + 4 * (picture_cells(holed, V) >= 0)
    picture = Grammar.picture(V, CELLS)
    return [
        Prompt((BLANK, words(1, 2)), picture, (0, "a")),
        Prompt((BLANK, retrieved, full), picture, (0, "b")),
        Prompt((caption,), Grammar.text(V, 20, V.eoss), (0, "c")),
        Prompt((BLANK, holed), Grammar.infill(V, [CELLS[:4]]), (0, "d"), (np.full(3, -1), holed_cells)),
        Prompt((BLANK, words(5)), Grammar.interleaved(V, GRID**2, 60), (0, "e")),
        Prompt((words(3),), picture, (0, "f")),
    ]


def whole_logits(model: Decoder, prompt: Prompt, tokens: np.ndarray, cells: np.ndarray) -> torch.Tensor:
    """(S, n, V) logits of each stream before each of its new ids, from whole sequences without a cache."""
    streams = []
    for stream, stream_cells in zip(prompt.streams, prompt.cells, strict=True):
        ids = torch.tensor(np.append(stream, tokens))[None]
        cell = torch.tensor(np.append(stream_cells, cells))[None]
        logits = model.logits(ids, torch.zeros_like(ids), torch.arange(ids.shape[1])[None], cell)[0]
        streams.append(logits[len(stream) - 1 : -1])
    return torch.stack(streams)


def expected(model: Decoder, prompt: Prompt, settings: SamplingSettings) -> Sampled:
    """The greedy sample, one id after the other from whole sequences, by the formulas in float64."""
    g, s = prompt.grammar, settings
    state = g.start
    tokens: list[int] = []
    cells: list[int] = []
    chosen: list[float] = []
    while state:
        with torch.inference_mode():
            logits = whole_logits(model, prompt, np.array([*tokens, 0]), np.array([*cells, -1]))[:, -1].double()
        left = g.max_length - len(tokens)
        allowed = g.allow[state] & (g.needed[g.next[state]] < left)
        forbidden = torch.tensor(~allowed[g.class_of])
        log_p = logits.masked_fill(forbidden, -torch.inf).log_softmax(-1)
        scores = log_p[-1]
        if g.is_drawing[state] and len(logits) > 1 and s.contrastive_k:
            kth = log_p[-1].exp().sort(descending=True).values[s.contrastive_k - 1]
            scores = log_p[-1] - logits[0].log_softmax(-1)
            scores[log_p[-1].exp() < s.contrastive_alpha * kth] = -torch.inf
        elif g.is_drawing[state] and len(logits) > 1 and s.is_guided:
            ramp = {"constant": 1, "linear": g.progress[state], "cosine": (1 - np.cos(np.pi * g.progress[state])) / 2}
            w = [1 + (w - 1) * float(ramp[s.guidance_schedule]) for w in (s.retrieval_guidance, s.guidance)]
            differences = zip(w[3 - len(logits) :], logits[1:] - logits[:-1], strict=True)
            scores = logits[0] + sum(weight * difference for weight, difference in differences)
        id = int(scores.masked_fill(forbidden, -torch.inf).argmax())
        tokens.append(id)
        cells.append(int(g.cell[state]) if V.image_start <= id < V.image_end else -1)
        chosen.append(float(log_p[-1, id]))
        state = g.next[state, g.class_of[id]]
    return Sampled(np.array(tokens), np.array(chosen, dtype=np.float32))


@pytest.mark.parametrize("settings", [GREEDY, GUIDED, CONTRASTIVE], ids=["greedy", "guided", "contrastive"])
def test_ids_and_log_probabilities_are_those_of_whole_sequences(model: Decoder, settings: SamplingSettings) -> None:
    """Prompts of all tasks, one to three streams and lengths in one batch, against each alone without a cache."""
    settings = dataclasses.replace(settings, temperature=0)
    prompts = tasks()[:5]
    for prompt, found in zip(prompts, sample(model, prompts, settings), strict=True):
        alone = expected(model, prompt, settings)
        assert found.tokens.tolist() == alone.tokens.tolist()
        np.testing.assert_allclose(found.log_probability, alone.log_probability, atol=1e-5)


@pytest.mark.parametrize("settings", [SamplingSettings(), GUIDED, CONTRASTIVE], ids=["plain", "guided", "contrastive"])
def test_a_sample_is_the_same_alone_and_in_a_batch(model: Decoder, settings: SamplingSettings) -> None:
    prompts = tasks()[:5]
    together = sample(model, prompts, settings)
    assert len({len(found.tokens) for found in together}) > 2
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = sample(model, [prompt], settings)
        assert np.array_equal(alone.tokens, found.tokens)
        np.testing.assert_allclose(alone.log_probability, found.log_probability, atol=1e-5)


def test_prompts_that_do_not_fit_one_forward_pass_are_read_in_several(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sample(model, tasks(), GUIDED)
    monkeypatch.setattr("mmtrain.generate.sampling.PREFILL_TOKENS", 30)
    for a, b in zip(whole, sample(model, tasks(), GUIDED), strict=True):
        assert np.array_equal(a.tokens, b.tokens)


def test_the_seed_decides(model: Decoder) -> None:
    prompt = tasks()[5]
    reseeded = dataclasses.replace(prompt, seed=(1, "f"))
    first, again, other = sample(model, [prompt, prompt, reseeded], SamplingSettings())
    assert np.array_equal(first.tokens, again.tokens) and not np.array_equal(first.tokens, other.tokens)


def test_given_continuations_score_as_when_they_were_drawn(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [*tasks(), Prompt((words(3),), Grammar.text(V, 1, V.eoss), (0, "forced to end"))]
    drawn = sample(model, prompts, GUIDED)
    monkeypatch.setattr("mmtrain.generate.sampling.PREFILL_TOKENS", 100)
    for found, scored in zip(drawn, score(model, prompts, [found.tokens for found in drawn]), strict=True):
        np.testing.assert_allclose(scored, found.log_probability, atol=1e-5)


def test_a_continuation_that_the_grammar_forbids_is_not_scored(model: Decoder) -> None:
    caption = tasks()[2]
    for forbidden in ([V.eoss], [V.text_start, V.brk], [V.text_start, V.eoss, V.text_start], [V.image_start]):
        with pytest.raises(ValueError, match="the grammar forbids id"):
            score(model, [caption], [np.array(forbidden)])


def test_new_ids_are_shown_as_they_are_written(model: Decoder) -> None:
    shown: list[np.ndarray] = []
    found = sample(model, tasks(), GUIDED, lambda step, ids: shown.append(ids.copy()) or None)
    for row, sampled in zip(np.stack(shown, axis=1), found, strict=True):
        n = len(sampled.tokens)
        assert row[:n].tolist() == sampled.tokens.tolist() and (row[n:] == -1).all()


def test_guidance_1_and_grammars_without_pictures_need_one_stream(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    new_cache = model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda batch, size: rows.append(batch) or new_cache(batch, size))
    picture, text = tasks()[1], tasks()[2]
    sample(model, [picture], SamplingSettings(guidance=1.0))
    sample(model, [dataclasses.replace(text, streams=(BLANK, text.streams[0]), cells=())], SamplingSettings(guidance=3))
    sample(model, [picture], GUIDED)
    assert rows == [1, 1, 3]


def test_a_prompt_that_is_too_long_is_a_sentence(model: Decoder) -> None:
    picture = Grammar.picture(V, CELLS)
    with pytest.raises(UserError, match="57 tokens and 16 new ones exceed the model's 72 positions"):
        sample(model, [Prompt((np.full(57, 7),), picture, (0,))], GREEDY)
    (found,) = sample(model, [Prompt((np.full(56, 7),), picture, (0,))], GREEDY)
    assert len(found.tokens) == 16
    assert sample(model, [], GREEDY) == []


def shares(settings: SamplingSettings, allowed: list[bool] | None = None) -> list[float]:
    probability = torch.tensor([0.05, 0.3, 0.15, 0.5])
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    logits = probability.log()
    if allowed:
        logits = logits.masked_fill(~torch.tensor(allowed), -torch.inf)
    drawn = draw(logits.expand(20_000, 4), uniform, settings)
    return (torch.bincount(drawn, minlength=4) / 20_000).tolist()


def test_draws_follow_the_probabilities_of_what_is_kept() -> None:
    assert shares(SamplingSettings(top_p=1.0)) == pytest.approx([0.05, 0.3, 0.15, 0.5], abs=1e-3)
    # The smallest set that holds at least 0.7 of the probability.
    assert shares(SamplingSettings(top_p=0.7)) == pytest.approx([0, 0.375, 0, 0.625], abs=1e-3)
    assert shares(SamplingSettings(top_p=1e-20)) == [0, 0, 0, 1]
    assert shares(SamplingSettings(top_p=1.0, top_k=3)) == pytest.approx([0, 0.3158, 0.1579, 0.5263], abs=1e-3)
    # top_p holds a share of what top_k has kept.
    assert shares(SamplingSettings(top_p=0.6, top_k=2)) == [0, 0, 0, 1]
    first = [True, True, True, False]
    assert shares(SamplingSettings(top_p=1.0), first) == pytest.approx([0.1, 0.6, 0.3, 0], abs=1e-3)
    root = torch.tensor([0.05, 0.3, 0.15, 0.5]).sqrt()
    hot = (root / root.sum()).tolist()
    assert shares(SamplingSettings(temperature=2.0, top_p=1.0)) == pytest.approx(hot, abs=1e-3)
    assert shares(SamplingSettings(temperature=0)) == [0, 0, 0, 1]


def test_the_nucleus_is_the_smallest_set_that_holds_top_p() -> None:
    probability = torch.tensor([[0.125, 0.5, 0.0625, 0.25, 0.0625]])
    assert [nucleus(probability, p).item() for p in (0.5, 0.51, 0.75, 0.76, 0.9)] == [0.5, 0.25, 0.25, 0.125, 0.0625]


def test_the_smallest_and_largest_draw_stay_inside_what_is_kept() -> None:
    logits = torch.log(torch.tensor([[0.0, 0.7, 0.2, 0.05, 0.05]]))
    for uniform, expected_id in ((0.0, 1), (1 - 2**-53, 2)):
        drawn = draw(logits, torch.tensor([uniform], dtype=torch.float64), SamplingSettings(top_p=0.75))
        assert drawn.item() == expected_id


def test_guidance_is_its_formula() -> None:
    u, r, f = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    half = torch.tensor([0.0, 0.5])
    two = guided(torch.stack([u, f]), half, SamplingSettings(guidance=3.0))
    torch.testing.assert_close(two, u + 3 * (f - u))
    three = guided(torch.stack([u, r, f]), half, SamplingSettings(guidance=3.0, retrieval_guidance=1.5))
    torch.testing.assert_close(three, u + 1.5 * (r - u) + 3 * (f - r))
    linear_ramp = guided(torch.stack([u, f]), half, SamplingSettings(guidance=3.0, guidance_schedule="linear"))
    torch.testing.assert_close(linear_ramp, u + torch.tensor([[1.0], [2.0]]) * (f - u))


def test_contrastive_decoding_keeps_what_is_probable_and_prefers_what_the_condition_made_so() -> None:
    """CM3leon sec. 3.1 with k = 2, alpha = 0.5: the second of p is 0.3, so ids of at least 0.15 stay."""
    conditional = torch.tensor([[0.5, 0.3, 0.15001, 0.05]]).log()
    plain = torch.tensor([[0.6, 0.2, 0.05, 0.15]]).log()
    settings = SamplingSettings(contrastive_k=2, contrastive_alpha=0.5)
    scores = contrasted(torch.stack([plain, conditional]) + 7, conditional + 7, settings)
    torch.testing.assert_close(scores.exp(), torch.tensor([[0.5 / 0.6, 1.5, 3.0002, 0.0]]))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 is no temperature"),
        ({"top_p": 0.0}, "top_p=0.0 keeps no token"),
        ({"top_k": -1}, "use 0 .off. or more"),
        ({"guidance": float("nan")}, "use finite numbers"),
        ({"guidance_schedule": "steps"}, "use one of constant, linear, cosine"),
        ({"contrastive_alpha": 1.5}, "contrastive_alpha=1.5"),
        ({"contrastive_k": 2, "retrieval_guidance": 2.0}, "set retrieval_guidance=0 or contrastive_k=0"),
        ({"contrastive_k": 2, "guidance_schedule": "linear"}, "no weight to schedule"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check(dataclasses.replace(SamplingSettings(), **changes))


def test_contrastive_decoding_of_a_single_stream_is_refused(model: Decoder) -> None:
    with pytest.raises(UserError, match="contrastive_k needs an unconditional stream"):
        sample(model, [tasks()[5]], CONTRASTIVE)
    assert sample(model, [tasks()[2]], CONTRASTIVE)  # nothing to contrast in a text
    with pytest.raises(ValueError, match="three streams need retrieval_guidance"):
        sample(model, [tasks()[1]], SamplingSettings(guidance=2.0))


@pytest.mark.parametrize("vectors", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_few_vectors_have_the_product_of_many(vectors: int, shape: tuple[int, int]) -> None:
    weight, x = torch.randn(shape), torch.randn(vectors, 1, shape[1])
    with torch.inference_mode():
        found = linear(x, weight)
    assert found.shape == (vectors, 1, shape[0])
    torch.testing.assert_close(found, x @ weight.t(), rtol=1e-5, atol=1e-5)

"""From words to pictures and back with real tokenizers and an untrained model."""

import numpy as np
import pytest

from mmtrain.config import ImageTokenizerConfig, ModelConfig, TextTokenizerConfig, UserError
from mmtrain.generate import Sampler, SamplingSettings
from mmtrain.models import build_model
from mmtrain.tokens import ImageTokenizer, TextTokenizer, Vocabulary

SIZE = 16


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    text = TextTokenizer.train(["a red circle", "two blue squares"] * 3, TextTokenizerConfig(vocab_size=270))
    image = ImageTokenizer(ImageTokenizerConfig(levels=[4, 4], width=8), SIZE).eval()
    vocabulary = Vocabulary(text.size, image.num_codes, 4)
    config = ModelConfig(layers=2, width=32, heads=2, init_std=0.2, zero_init_outputs=False)
    model = build_model(config, vocabulary.size, 48)
    model.initialize(0)
    return Sampler(model.eval(), vocabulary, text, image, batch_size=3)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)


def test_every_caption_gets_its_samples_in_order(sampler: Sampler) -> None:
    samples = sampler.images(["a red circle", "two"], SamplingSettings(guidance=2.0), seed=0, num_samples=2)
    assert [(s.prompt, s.number) for s in samples] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(s.pixels is not None and s.pixels.shape == (SIZE, SIZE, 3) for s in samples)
    assert {s.pixels.dtype for s in samples if s.pixels is not None} == {np.dtype(np.uint8)}


def test_the_batch_size_does_not_show(sampler: Sampler) -> None:
    settings = SamplingSettings(guidance=2.0)
    one = Sampler(sampler.model, sampler.vocabulary, sampler.text, sampler.image, batch_size=1)
    for a, b in zip(
        sampler.images(["a red circle", "two"], settings, 5, 2), one.images(["a red circle", "two"], settings, 5, 2),
        strict=True,
    ):
        assert np.array_equal(a.pixels, b.pixels)


def test_captions_are_text_and_no_longer_than_asked(sampler: Sampler, pictures: np.ndarray) -> None:
    samples = sampler.captions(pictures, SamplingSettings(), seed=0, num_samples=2, max_tokens=6)
    assert [(s.prompt, s.number) for s in samples] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(len(sampler.text.encode(s.text)) <= 12 for s in samples)


def test_a_caption_ends_where_the_model_closes_it(
    sampler: Sampler, pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    v = sampler.vocabulary
    words = [v.text_start + i for i in sampler.text.encode("a red circle")]
    row = np.array([*words, v.eoss, v.eoss])
    monkeypatch.setattr("mmtrain.generate.pipeline.sample_tokens", lambda *_: row[None].repeat(2, axis=0))
    assert [s.text for s in sampler.captions(pictures, SamplingSettings(), 0)] == ["a red circle"] * 2


def test_retrieved_documents_that_do_not_fit_are_left_out(sampler: Sampler) -> None:
    v = sampler.vocabulary
    short, long = (np.full(n, v.text_start, dtype=v.dtype) for n in (3, 500))
    settings = SamplingSettings(guidance=2.0)
    with_both = sampler.images(["a"], settings, 0, retrieved=[[short, long]])
    with_short = sampler.images(["a"], settings, 0, retrieved=[[short]])
    without = sampler.images(["a"], settings, 0)
    assert np.array_equal(with_both[0].pixels, with_short[0].pixels)
    assert not np.array_equal(with_both[0].pixels, without[0].pixels)


def test_an_empty_caption_and_one_that_is_too_long_are_refused(sampler: Sampler) -> None:
    with pytest.raises(UserError, match="prompt 2 is empty"):
        sampler.images(["a", " \n"], SamplingSettings(), 0)
    with pytest.raises(UserError, match="exceed the model's 48 positions"):
        sampler.images(["a red circle " * 30], SamplingSettings(), 0)

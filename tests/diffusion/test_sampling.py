"""Samplers: shapes, guidance, seeds, and what a diffusion model is not asked for."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from mmtrain.config import DiffusionConfig, ImageTokenizerConfig, ModelConfig, TextTokenizerConfig, UserError
from mmtrain.diffusion import DiffusionTransformer, build_diffusion, forward_flops, sample_latents
from mmtrain.generate import PictureSampler, Request, SamplingSettings
from mmtrain.tokens import ImageTokenizer, TextTokenizer

MODEL = ModelConfig(family="dit", layers=1, width=32, heads=2)
CAPTIONS = [np.array([1, 2, 3]), np.array([4])]
KEYS = [(0, "a"), (0, "b")]
STEPS = 4


def small_model(diffusion: DiffusionConfig) -> DiffusionTransformer:
    model = build_diffusion(MODEL, diffusion, 256, 16, (3, 4, 4))
    model.initialize(0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "proj_out" in name or "attn2.to_out" in name:  # zero at the start: captions would not matter
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("objective", "sampler"), [("rectified_flow", "auto"), ("ddpm", "auto"), ("ddpm", "ddim"), ("ddpm", "dpm_solver")]
)
def test_every_sampler_gives_finite_latents_that_depend_on_caption_and_seed(objective: str, sampler: str) -> None:
    diffusion = DiffusionConfig(objective=objective, sampler=sampler, sampling_steps=STEPS)
    model = small_model(diffusion)
    latents, work = sample_latents(model, CAPTIONS, KEYS, 2.0, diffusion)
    assert latents.shape == (2, 3, 4, 4) and np.isfinite(latents).all()
    assert work.pictures == 2 * 2 * STEPS and work.tokens == STEPS * (1 + 1 + 3 + 1)  # null captions of one token
    alone, _ = sample_latents(model, CAPTIONS[:1], KEYS[:1], 2.0, diffusion)
    assert np.allclose(alone[0], latents[0], atol=1e-4)
    other, _ = sample_latents(model, [CAPTIONS[1]] * 2, KEYS, 2.0, diffusion)
    assert not np.allclose(other[0], latents[0], atol=1e-2)


def test_guidance_moves_away_from_the_null_caption() -> None:
    diffusion = DiffusionConfig(sampling_steps=1)
    model = small_model(diffusion)
    at = [sample_latents(model, CAPTIONS, KEYS, w, diffusion)[0] for w in (0.0, 1.0, 3.0)]
    assert np.allclose(at[2], at[0] + 3 * (at[1] - at[0]), atol=1e-4)


def test_the_straight_line_is_followed_back() -> None:
    """With the true velocity of one picture, the sampler ends at that picture."""
    diffusion = DiffusionConfig(sampling_steps=5)
    model = small_model(diffusion)
    picture = torch.randn(3, 4, 4)
    model.predict = lambda x, t, *_: (x - picture) / (t / 1000)[:, None, None, None]  # type: ignore[method-assign]
    latents, _ = sample_latents(model, CAPTIONS, KEYS, 1.0, diffusion)
    assert np.allclose(latents, picture.numpy(), atol=1e-4)


def test_noise_is_added_as_diffusers_adds_it() -> None:
    diffusion = DiffusionConfig(objective="ddpm", beta_schedule="squaredcos_cap_v2")
    latents, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    noisy, target, timestep = small_model(diffusion).diffuse(latents, noise, torch.tensor([0.1, 0.9]))
    schedule = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    assert timestep.tolist() == [100.0, 900.0] and torch.equal(target, noise)
    assert torch.allclose(noisy, schedule.add_noise(latents, noise, timestep.long()), atol=1e-6)


def test_the_noise_is_taken_away_again() -> None:
    """With the true noise of one picture, ddpm's samplers end near that picture: the schedules agree."""
    for sampler in ("ddim", "dpm_solver"):
        diffusion = DiffusionConfig(objective="ddpm", sampler=sampler, sampling_steps=20)
        model = small_model(diffusion)
        picture = torch.randn(3, 4, 4)

        def noise(x: torch.Tensor, t: torch.Tensor, *_: object) -> torch.Tensor:
            a = model.remaining[t.long()][:, None, None, None]  # noqa: B023
            return (x - a.sqrt() * picture) / (1 - a).sqrt()  # noqa: B023

        model.predict = noise  # type: ignore[method-assign]
        latents, _ = sample_latents(model, CAPTIONS, KEYS, 1.0, diffusion)
        assert np.allclose(latents, picture.numpy(), atol=0.02), sampler


@pytest.fixture
def sampler() -> PictureSampler:
    diffusion = DiffusionConfig(sampling_steps=2)
    torch.manual_seed(0)
    image = ImageTokenizer(ImageTokenizerConfig(levels=[8, 6, 5], width=8), 32).eval()
    text = TextTokenizer.train(["a red circle"] * 3, TextTokenizerConfig(vocab_size=257))
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    return PictureSampler(small_model(diffusion), text, image, diffusion, zero, one)


def test_pictures_come_in_the_order_of_the_captions(sampler: PictureSampler) -> None:
    samples = sampler.images(["a red", "circle"], SamplingSettings(guidance=1.0), seed=3, num_samples=2)
    assert [(s.prompt, s.number) for s in samples] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert samples[0].pixels.shape == (32, 32, 3) and samples[0].pixels.dtype == np.uint8
    assert not np.array_equal(samples[0].pixels, samples[1].pixels)
    w = sampler.work
    assert w.pictures == 4 * 2
    assert sampler.flops == sum(forward_flops(MODEL, sampler.diffusion, (3, 4, 4), w.pictures, w.tokens, w.squares))


def test_what_needs_words_or_probabilities_is_refused(sampler: PictureSampler) -> None:
    settings = SamplingSettings()
    with pytest.raises(UserError, match="draws pictures alone"):
        sampler.captions(np.zeros((1, 32, 32, 3), np.uint8), settings, 0)
    assert sampler.captions(np.zeros((0, 32, 32, 3), np.uint8), settings, 0) == []
    with pytest.raises(UserError, match="best_of"):
        sampler.draw([Request("a")], settings, best_of=2)
    with pytest.raises(UserError, match="guided by generate.guidance alone"):
        sampler.draw([Request("a")], SamplingSettings(contrastive_k=3))
    with pytest.raises(UserError, match="more than the 16"):
        sampler.tasks("image", [Request("x" * 40)], settings)


def test_latents_are_what_the_codes_are_rounded_from() -> None:
    torch.manual_seed(0)
    image = ImageTokenizer(ImageTokenizerConfig(levels=[8, 6, 5], width=8), 32).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    latents = image.latents(pixels)
    assert latents.shape == (3, 3, 4, 4) and latents.dtype == np.float32
    assert np.array_equal(image.decode_latents(latents, round_to_codes=True), image.decode(image.encode(pixels)))
    assert not np.array_equal(image.decode_latents(latents), image.decode(image.encode(pixels)))
    with pytest.raises(UserError, match="latents need"):
        ImageTokenizer(ImageTokenizerConfig(quantizer="vq", width=8), 32).latents(pixels)

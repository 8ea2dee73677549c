"""The closed form of FLOPs against torch's counter, on the meta device (on the CPU that counter drops attention)."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmtrain.config import DiffusionConfig, ModelConfig
from mmtrain.diffusion import build_diffusion, forward_flops, recomputed_flops
from mmtrain.diffusion.count import FREQUENCIES

MODEL = ModelConfig(family="dit", layers=3, width=96, heads=3)
LATENT = (3, 8, 8)
N, T = 5, 17  # pictures, tokens of every caption
SUMS = N, N * T, N * T * T


def counted(model: ModelConfig, diffusion: DiffusionConfig) -> tuple[int, int]:
    """FLOPs of the forward pass, and of both."""
    network = build_diffusion(model, diffusion, 300, 50, LATENT, "meta").train()
    with torch.device("meta"):
        latents, level = torch.empty(N, *LATENT), torch.empty(N)
        caption, length = torch.empty(N, T, dtype=torch.int64), torch.empty(N, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        losses = network(latents, latents, level, caption, length, level)
        forward = counter.get_total_flops()
        losses.total.backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("change", [{}, {"text_layers": 0}, {"text_layers": 2, "patch_size": 2}])
def test_the_forward_pass_is_counted_exactly(change: dict[str, int]) -> None:
    diffusion = DiffusionConfig(**change)
    forward, both = counted(MODEL, diffusion)
    ours = sum(forward_flops(MODEL, diffusion, LATENT, *SUMS))
    assert forward == ours
    # Nobody needs the gradients of the first layers' inputs, which the convention of three times forward counts.
    first = LATENT[0] * LATENT[1] * LATENT[2] + FREQUENCIES
    assert 3 * ours - both == N * 2 * first * MODEL.width


def test_recomputation_is_counted() -> None:
    model, diffusion = replace(MODEL, activation_checkpointing=True), DiffusionConfig()
    _, both = counted(model, diffusion)
    _, without = counted(MODEL, diffusion)
    assert both - without == recomputed_flops(model, diffusion, LATENT, *SUMS)

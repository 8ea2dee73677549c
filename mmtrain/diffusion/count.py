"""FLOPs of the diffusion transformer in closed form; conventions as in `mmtrain.flops.count`.

Attention is in both directions, so nothing is halved; a caption of n tokens counts n, without padding.
P tokens of a picture (its latent cells, or patches of them), n tokens of a caption, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from mmtrain.config import DiffusionConfig, ModelConfig
from mmtrain.diffusion.network import build_diffusion

FREQUENCIES = 256  # of a timestep's embedding, fixed in diffusers


@dataclass(frozen=True)
class Work:
    """Sums over pictures that went through the model; they add up. squares: of the lengths of the captions.

    padded_tokens, padded_squares: the same with the padding that is computed.
    """

    pictures: int = 0
    tokens: int = 0
    squares: int = 0
    padded_tokens: int = 0
    padded_squares: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @classmethod
    def of(cls, length_N: np.ndarray) -> "Work":
        """Of one batch of captions, padded to the longest."""
        n, longest = len(length_N), int(length_N.max(initial=0))
        length_N = length_N.astype(np.int64)
        return cls(n, int(length_N.sum()), int((length_N**2).sum()), n * longest, n * longest**2)


def forward_flops(
    model: ModelConfig, diffusion: DiffusionConfig, latent: Sequence[int], pictures: int, tokens: int, squares: int
) -> tuple[int, int]:
    """Forward FLOPs of (pictures, captions): what is computed at the tokens of the pictures, and of the captions.

    latent: (C, G, G); tokens, squares: sums of the lengths of the captions and of their squares. Scores of
    cross-attention are the pictures'.
    """
    D, L, (channels, grid, _) = model.width, model.layers, latent
    P = (grid // diffusion.patch_size) ** 2
    patch = channels * diffusion.patch_size**2
    per_picture = 2 * 2 * P * patch * D  # into patches and out of them
    per_picture += 2 * (FREQUENCIES * D + D * D + 6 * D * D)  # noise level, modulation
    # queries, keys, values and output of self-attention, queries and output of cross-attention, feed-forward of 4 D
    per_picture += L * (2 * P * D * D * (4 + 2 + 8) + 4 * P * P * D)
    of_pictures = pictures * per_picture + L * 4 * P * D * tokens
    per_token = 2 * D * D * (2 + 2 * L + 12 * diffusion.text_layers)  # projection; keys and values; encoder
    of_captions = tokens * per_token + diffusion.text_layers * 4 * D * squares
    return of_pictures, of_captions


def recomputed_flops(
    model: ModelConfig, diffusion: DiffusionConfig, latent: Sequence[int], pictures: int, tokens: int, squares: int
) -> int:
    """What activation checkpointing computes a second time: the blocks, less the last product of a caption's block."""
    D, L, (_, grid, _) = model.width, model.layers, latent
    P = (grid // diffusion.patch_size) ** 2
    blocks = L * (pictures * (2 * P * D * D * 14 + 4 * P * P * D) + tokens * (4 * D * D + 4 * P * D))
    return blocks + diffusion.text_layers * (tokens * 2 * D * D * 8 + 4 * D * squares)


def count_parameters(
    model: ModelConfig, diffusion: DiffusionConfig, text_size: int, max_text: int, latent: Sequence[int]
) -> int:
    """Parameters of the model; nothing is allocated."""
    network = build_diffusion(model, diffusion, text_size, max_text, latent, "meta")
    return sum(p.numel() for p in network.parameters())

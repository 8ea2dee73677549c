"""What is drawn for a picture in training: noise level, noise, and whether its caption is left out.

A pure function of (seed, split, source, epoch, document), so that a resumed run, another number of processes or another
packing draws the same. N pictures, C channels, G side of the latent grid.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mmtrain.config import DiffusionConfig
from mmtrain.config.randomness import random_stream


class Draw(NamedTuple):
    """level: (N,) float32 in (0, 1), 1 is noise alone; noise: (N, C, G, G) float32; is_dropped: (N,) bool, captions."""

    level: np.ndarray
    noise: np.ndarray
    is_dropped: np.ndarray


def draw_noise(keys: Sequence[tuple[int | str, ...]], shape: tuple[int, int, int], config: DiffusionConfig) -> Draw:
    """The draw of each key for a latent of `shape` (C, G, G)."""
    draw = Draw(
        np.empty(len(keys), np.float32), np.empty((len(keys), *shape), np.float32), np.empty(len(keys), bool)
    )
    for i, key in enumerate(keys):
        stream = random_stream("diffusion", *key)
        uniform, normal, caption = stream.random(), stream.standard_normal(), stream.random()
        draw.level[i] = uniform if config.timesteps == "uniform" else 1 / (1 + math.exp(-normal))
        draw.is_dropped[i] = caption < config.caption_dropout
        stream.standard_normal(dtype=np.float32, out=draw.noise[i])
    return draw

"""The order of an epoch: a seeded permutation that is computed, never stored."""

import math

import numpy as np
from numpy.typing import ArrayLike

ROUNDS = 6
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment of splitmix64
ODD = 0xD1342543DE82EF95  # another odd constant, so that epochs and rounds do not meet
WORD = (1 << 64) - 1


def permute(index: ArrayLike, n: int, seed: int, epoch: ArrayLike = 0) -> np.ndarray:
    """Place of `index` in the order of `epoch`: a bijection of 0..n-1 for each seed and epoch.

    A Feistel network over a grid of about sqrt(n) x sqrt(n) cells with addition instead of xor, so that the grid
    is hardly larger than n; values outside 0..n-1 walk on along their cycle until they are inside.
    index, epoch: integers or arrays that broadcast, index in [0, n). Returns int64 of their shape.
    """
    index, epoch = np.broadcast_arrays(np.asarray(index, dtype=np.uint64), np.asarray(epoch, dtype=np.uint64))
    shape = index.shape
    value, epochs = index.reshape(-1).copy(), epoch.reshape(-1)
    height = math.isqrt(n - 1) + 1
    width = -(-n // height)
    outside = np.arange(len(value))
    while len(outside):
        value[outside] = _shuffle(value[outside], epochs[outside], height, width, seed)
        outside = outside[value[outside] >= n]
    return value.astype(np.int64).reshape(shape)


def _shuffle(value: np.ndarray, epoch: np.ndarray, height: int, width: int, seed: int) -> np.ndarray:
    """One pass of the network over cells 0..height*width-1. value, epoch: (k,) uint64."""
    row, column = np.divmod(value, np.uint64(width))
    for number in range(ROUNDS):
        key = _mix(epoch * np.uint64(ODD) + np.uint64((seed * GOLDEN + number) & WORD))
        if number % 2 == 0:
            row = (row + _mix(column ^ key) % np.uint64(height)) % np.uint64(height)
        else:
            column = (column + _mix(row ^ key) % np.uint64(width)) % np.uint64(width)
    return row * np.uint64(width) + column


def _mix(word: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele et al. 2014), elementwise on uint64."""
    word = word + np.uint64(GOLDEN)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))

"""The order of an epoch: a seeded permutation that is computed, never stored."""

import math

import numpy as np
from numpy.typing import ArrayLike

ROUNDS = 6
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment of splitmix64
ODD = 0xD1342543DE82EF95  # another odd constant, so that epochs and rounds do not meet
SHARDS = 0x5851F42D4C957F2D  # changes the seed for the order of shards
EPOCHS_KEPT = 4  # lanes and look-ahead are never farther apart, but in tiny data sets
WORD = (1 << 64) - 1


class Order:
    """Where the documents of an epoch come from: all of them in a new order every epoch, each once.

    With `shuffle_shards` > 0 the shards are shuffled first and then the documents of so many shards at a time, so
    that a reader needs only these at hand. Memory: one number per shard.
    """

    def __init__(self, shard_documents: ArrayLike, seed: int, shuffle_shards: int = 0) -> None:
        """shard_documents: (m,) documents of each shard. Documents are numbered through all shards."""
        sizes = np.asarray(shard_documents, dtype=np.int64)
        self._start = np.concatenate([[0], np.cumsum(sizes)])
        self._seed, self._together = seed, shuffle_shards if shuffle_shards < len(sizes) else 0
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return int(self._start[-1])

    def places(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and document index at positions of the endless order; positions run on through all epochs.

        position: (k,) int64. Returns two (k,) int64.
        """
        epoch, within = np.divmod(position, len(self))
        if not self._together:
            return epoch, permute(within, len(self), self._seed, epoch)
        index = np.empty_like(within)
        for number in np.unique(epoch).tolist():
            chosen = epoch == number
            index[chosen] = self._places_in(number, within[chosen])
        return epoch, index

    def shards(self, epoch: int, within: int) -> np.ndarray:
        """Numbers of the shards that the documents around place `within` of an epoch come from, in reading order."""
        if not self._together:
            return np.arange(len(self._start) - 1)
        shards, start = self._shards_of(epoch)
        first = (int(np.searchsorted(start, within, side="right")) - 1) // self._together * self._together
        return shards[first : first + self._together]

    def _places_in(self, epoch: int, within: np.ndarray) -> np.ndarray:
        """Document index at places of one epoch, for shards that are shuffled in groups."""
        shards, start = self._shards_of(epoch)
        index = np.empty_like(within)
        groups = (np.searchsorted(start, within, side="right") - 1) // self._together
        for group in np.unique(groups).tolist():
            first, last = group * self._together, min((group + 1) * self._together, len(shards))
            chosen = groups == group
            low, size = int(start[first]), int(start[last] - start[first])
            # Another key for each group of each epoch; the shards themselves have that of the epoch alone.
            place = low + permute(within[chosen] - low, size, self._seed, epoch * len(shards) + group)
            rank = np.searchsorted(start, place, side="right") - 1
            index[chosen] = self._start[shards[rank]] + place - start[rank]
        return index

    def _shards_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard numbers in the order of an epoch, and the place of the first document of each (and the end)."""
        if epoch not in self._known:
            count = len(self._start) - 1
            shards = permute(np.arange(count), count, self._seed ^ SHARDS, epoch)
            sizes = np.diff(self._start)[shards]
            while len(self._known) >= EPOCHS_KEPT:
                self._known.pop(next(iter(self._known)))
            self._known[epoch] = shards, np.concatenate([[0], np.cumsum(sizes)])
        return self._known[epoch]


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

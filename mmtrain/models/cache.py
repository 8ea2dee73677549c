"""Keys and values that sampling keeps, so that a new token costs one position and not the whole prefix.

L layers, B batch, G heads of keys and values, T positions, K head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KVCache:
    """Keys and values of the positions seen so far; `length` of `capacity` positions are filled."""

    keys_LBGTK: Tensor
    values_LBGTK: Tensor
    length: int = 0

    @classmethod
    def empty(cls, layers: int, batch: int, heads: int, capacity: int, head_size: int, like: Tensor) -> "KVCache":
        """A cache on the device and in the dtype of `like`."""
        shape = (layers, batch, heads, capacity, head_size)
        return cls(torch.zeros(shape, dtype=like.dtype, device=like.device), like.new_zeros(shape))

    def append(self, layer: int, k_BGSK: Tensor, v_BGSK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions of one layer; returns all keys and values up to and including them."""
        end = self.length + k_BGSK.shape[2]
        self.keys_LBGTK[layer, :, :, self.length : end] = k_BGSK
        self.values_LBGTK[layer, :, :, self.length : end] = v_BGSK
        return self.keys_LBGTK[layer, :, :, :end], self.values_LBGTK[layer, :, :, :end]

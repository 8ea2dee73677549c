"""Keys and values that sampling keeps, so that a new token costs one position and not the whole prefix.

L layers, B batch, H heads, G heads of keys and values, S new positions, T positions so far, K head size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class KVCache:
    """Keys and values of the positions seen so far; `length` of `capacity` positions are filled.

    bias_B1T: None, or what is added to the scores of one new position, over the whole capacity: -inf hides the
    padding of shorter prompts.
    """

    keys_LBGTK: Tensor
    values_LBGTK: Tensor
    length: int = 0
    bias_B1T: Tensor | None = None

    @property
    def capacity(self) -> int:
        """Most positions."""
        return self.keys_LBGTK.shape[3]

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

    def attend(
        self, layer: int, q_BHSK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Store the new positions and attend from them; (B, H, S, K).

        mask: (B, 1, S, T) bool; None: causal in an empty cache, or one new position that sees all that came before.
        """
        k, v = self.append(layer, k_BGSK, v_BGSK)
        grouped = q_BHSK.shape[1] != k.shape[1]
        if mask is not None:
            return F.scaled_dot_product_attention(q_BHSK, k, v, attn_mask=mask, enable_gqa=grouped)
        if self.length == 0:
            return F.scaled_dot_product_attention(q_BHSK, k, v, is_causal=True, enable_gqa=grouped)
        return self._attend_from_one(q_BHSK, k, v)

    def _attend_from_one(self, q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
        """Two batched products; the heads of a group are the rows of one."""
        B, G, T, K = k_BGTK.shape
        q = (q_BHSK * K**-0.5).reshape(B, G, -1, K)
        scores = q @ k_BGTK.transpose(2, 3)
        if self.bias_B1T is not None:
            scores = scores + self.bias_B1T[:, None, :, :T]
        return (scores.softmax(-1, dtype=torch.float32).to(v_BGTK.dtype) @ v_BGTK).view(q_BHSK.shape)

    def rows(self, rows: slice) -> "KVCache":
        """A view of some rows as an empty cache, to fill with their prompts."""
        return KVCache(self.keys_LBGTK[:, rows], self.values_LBGTK[:, rows])

    def keep(self, rows: Tensor) -> "KVCache":
        """A copy that holds only these rows, (n,) int64."""
        bias = None if self.bias_B1T is None else self.bias_B1T[rows]
        return KVCache(self.keys_LBGTK[:, rows], self.values_LBGTK[:, rows], self.length, bias)

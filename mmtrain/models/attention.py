"""Causal self-attention that never looks across packed documents.

B batch, S query positions, T key positions, D width, H heads, K head size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def document_mask(document_BS: Tensor) -> Tensor:
    """(B, 1, S, S) bool, True where position s may look at position t: same document and t <= s.

    Padding (document -1) forms a document of its own, so that no row of the softmax is empty.
    """
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    return same_BSS.tril_()[:, None]


@dataclass
class KVCache:
    """Keys and values of the positions seen so far; `length` of `capacity` positions are filled."""

    keys_LBHTK: Tensor
    values_LBHTK: Tensor
    length: int = 0

    @classmethod
    def empty(cls, layers: int, batch: int, heads: int, capacity: int, head_size: int, like: Tensor) -> "KVCache":
        """A cache on the device and in the dtype of `like`."""
        shape = (layers, batch, heads, capacity, head_size)
        return cls(torch.zeros(shape, dtype=like.dtype, device=like.device), like.new_zeros(shape))

    def append(self, layer: int, k_BHSK: Tensor, v_BHSK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions of one layer; returns all keys and values up to and including them."""
        end = self.length + k_BHSK.shape[2]
        self.keys_LBHTK[layer, :, :, self.length : end] = k_BHSK
        self.values_LBHTK[layer, :, :, self.length : end] = v_BHSK
        return self.keys_LBHTK[layer, :, :, :end], self.values_LBHTK[layer, :, :, :end]


class SelfAttention(nn.Module):
    """Multi-head attention with fused query, key and value projection and no biases."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BSD: Tensor, mask: Tensor | None, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """mask: (B, 1, S, T) bool, True = may attend; None = plain causal order. Returns (B, S, D)."""
        B, S, D = x_BSD.shape
        q_BHSK, k_BHSK, v_BHSK = self.qkv(x_BSD).view(B, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k_BHSK, v_BHSK = cache.append(layer, k_BHSK, v_BHSK)
        y_BHSK = F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, attn_mask=mask, is_causal=mask is None)
        return self.out(y_BHSK.transpose(1, 2).reshape(B, S, D))

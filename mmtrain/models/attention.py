"""Causal self-attention that never looks across packed documents.

B batch, S query positions, T key positions, D width, H heads, K head size; N documents of at most L tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def document_mask(document_BS: Tensor) -> Tensor:
    """(B, 1, S, S) bool, True where position s may look at position t: same document and t <= s.

    Padding (document -1) forms a document of its own, so that no row of the softmax is empty.
    """
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    return same_BSS.tril_()[:, None]


class Packing(NamedTuple):
    """How attention keeps packed documents apart: by a mask, or by laying them out one per row.

    mask: (B, 1, S, S) bool of `document_mask`, or None. positions_NL: int64, where in the flattened (B S) batch each
    token of a document stands; the last one repeats up to L. slots: (B S,) int64, the way back; padding points to
    slot 0, which is harmless, since nothing attends to padding and no loss falls on it.
    """

    mask: Tensor | None
    positions_NL: Tensor | None = None
    slots: Tensor | None = None


def pack_documents(document_BS: Tensor) -> Packing:
    """The cheaper of the two for a batch: scores of N L^2 by document, or of B S^2 under a mask.

    On a GPU always the mask: the layout depends on the data, and reading it there would stop the step.
    """
    B, S = document_BS.shape
    if document_BS.device.type != "cpu":
        return Packing(document_mask(document_BS))
    is_start = torch.ones_like(document_BS, dtype=torch.bool)
    is_start[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    starts = is_start.flatten().nonzero()[:, 0]
    lengths = torch.diff(starts, append=torch.tensor([B * S]))
    is_document = document_BS.flatten()[starts] >= 0
    starts, lengths = starts[is_document], lengths[is_document]
    longest = int(lengths.max()) if len(lengths) else S
    if len(starts) * longest**2 >= B * S**2:
        return Packing(document_mask(document_BS))
    offsets = torch.arange(longest)
    positions_NL = starts[:, None] + torch.minimum(offsets, lengths[:, None] - 1)
    is_token_NL = offsets < lengths[:, None]
    slots = torch.zeros(B * S, dtype=torch.int64)
    slots[positions_NL[is_token_NL]] = is_token_NL.flatten().nonzero()[:, 0]
    return Packing(None, positions_NL, slots)


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


def causal_products(q_NHLK: Tensor, k_NHLK: Tensor, v_NHLK: Tensor) -> Tensor:
    """Causal attention as two batched products, softmax in float32; (N, H, L, K) to (N, H, L, K).

    For short documents on CPU, where torch's fused kernel took three times as long (docs/log.md).
    """
    N, H, L, K = q_NHLK.shape
    future = torch.full((L, L), float("-inf"), dtype=q_NHLK.dtype).triu(1).expand(N * H, L, L)
    q, k, v = (x.flatten(0, 1) for x in (q_NHLK, k_NHLK, v_NHLK))
    scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=K**-0.5)
    return torch.bmm(scores.softmax(-1, dtype=torch.float32).to(v.dtype), v).view(N, H, L, K)


class SelfAttention(nn.Module):
    """Multi-head attention with fused query, key and value projection and no biases."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BSD: Tensor, packing: Packing, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """(B, S, D) to (B, S, D); with a cache the mask of `packing` is (B, 1, S, T) over all positions so far."""
        B, S, D = x_BSD.shape
        qkv = self.qkv(x_BSD)
        if packing.positions_NL is not None and packing.slots is not None:
            N, L = packing.positions_NL.shape
            qkv = qkv.view(B * S, 3 * D).index_select(0, packing.positions_NL.flatten()).view(N, L, 3 * D)
        q, k, v = qkv.unflatten(2, (3, self.heads, D // self.heads)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if packing.slots is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=packing.mask)
            return self.out(y.transpose(1, 2).flatten(2))
        y = causal_products(q, k, v).transpose(1, 2).flatten(2)
        return self.out(y.flatten(0, 1).index_select(0, packing.slots).view(B, S, D))

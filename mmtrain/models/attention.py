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


class Rotary(NamedTuple):
    """Rotary positions of a batch (Su et al. 2021): cosines and sines, (B, S, 1, 1, K / 2).

    Pairs are the two halves of a head, as in transformers' Llama and Chameleon.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, position_BS: Tensor, head_size: int, base: float) -> "Rotary":
        """The angles of `position_BS` in float32: position / base^(2 i / K) for pair i."""
        steps = torch.arange(0, head_size, 2, device=position_BS.device, dtype=torch.float32)
        angles = position_BS[:, :, None, None, None].float() * base ** (-steps / head_size)
        return cls(angles.cos(), angles.sin())

    def rotate(self, x_BSCHK: Tensor) -> Tensor:
        """Turn every pair of every head by the angle of its position; (B, S, C, H, K) to the same."""
        first, second = x_BSCHK.chunk(2, dim=-1)
        cos, sin = self.cos.type_as(x_BSCHK), self.sin.type_as(x_BSCHK)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


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


class QKNorm(nn.Module):
    """LayerNorm of the queries and keys over each head, with a gain and a bias (Chameleon, sec. 2.3).

    weight, bias: (2 H K,), queries before keys; flat, since vectors have no weight decay.
    """

    def __init__(self, heads: int, head_size: int, eps: float):
        super().__init__()
        self.heads, self.head_size, self.eps = heads, head_size, eps
        self.weight = nn.Parameter(torch.empty(2 * heads * head_size))
        self.bias = nn.Parameter(torch.empty(2 * heads * head_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gain 1, bias 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, qk_BSCHK: Tensor) -> Tensor:
        """(B, S, 2, H, K) to the same."""
        normed = F.layer_norm(qk_BSCHK, (self.head_size,), eps=self.eps)
        shape = (2, self.heads, self.head_size)
        return (normed * self.weight.view(shape) + self.bias.view(shape)).type_as(qk_BSCHK)


class SelfAttention(nn.Module):
    """Multi-head attention with fused query, key and value projection and no biases."""

    def __init__(self, width: int, heads: int, qk_norm_eps: float | None = None):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.qk_norm = QKNorm(heads, width // heads, qk_norm_eps) if qk_norm_eps is not None else None

    def forward(
        self,
        x_BSD: Tensor,
        packing: Packing,
        rotary: Rotary | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """(B, S, D) to (B, S, D); with a cache the mask of `packing` is (B, 1, S, T) over all positions so far."""
        B, S, D = x_BSD.shape
        qkv_BSCHK = self.qkv(x_BSD).unflatten(2, (3, self.heads, D // self.heads))
        if self.qk_norm is not None or rotary is not None:
            qk_BSCHK, v_BSCHK = qkv_BSCHK.split((2, 1), dim=2)
            if self.qk_norm is not None:
                qk_BSCHK = self.qk_norm(qk_BSCHK)
            if rotary is not None:
                qk_BSCHK = rotary.rotate(qk_BSCHK)
            qkv_BSCHK = torch.cat([qk_BSCHK, v_BSCHK], dim=2)
        if packing.positions_NL is not None and packing.slots is not None:
            N, L = packing.positions_NL.shape
            qkv_BSCHK = qkv_BSCHK.flatten(0, 1).index_select(0, packing.positions_NL.flatten()).unflatten(0, (N, L))
        q, k, v = qkv_BSCHK.permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if packing.slots is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=packing.mask)
            return self.out(y.transpose(1, 2).flatten(2))
        y = causal_products(q, k, v).transpose(1, 2).flatten(2)
        return self.out(y.flatten(0, 1).index_select(0, packing.slots).view(B, S, D))

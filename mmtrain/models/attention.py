"""Causal self-attention that never looks across packed documents.

B batch, S query positions, T key positions, D width, H heads, G heads of keys and values, K head size;
N documents of at most L tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.config import ModelConfig
from mmtrain.models.cache import KVCache
from mmtrain.models.linear import Linear


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
    """Rotary positions of a batch (Su et al. 2021): cosines and sines, (B, S, 1, K / 2).

    Pairs are the two halves of a head, as in transformers' Llama and Chameleon.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, position_BS: Tensor, head_size: int, base: float) -> "Rotary":
        """The angles of `position_BS` in float32: position / base^(2 i / K) for pair i."""
        steps = torch.arange(0, head_size, 2, device=position_BS.device, dtype=torch.float32)
        angles = position_BS[:, :, None, None].float() * base ** (-steps / head_size)
        return cls(angles.cos(), angles.sin())

    def rotate(self, x_BSHK: Tensor) -> Tensor:
        """Turn every pair of every head by the angle of its position; (B, S, H, K) to the same."""
        first, second = x_BSHK.chunk(2, dim=-1)
        cos, sin = self.cos.type_as(x_BSHK), self.sin.type_as(x_BSHK)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


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

    heads: of queries and keys together. weight, bias: (heads K,), queries before keys; flat, since vectors have no
    weight decay.
    """

    def __init__(self, heads: int, head_size: int, eps: float):
        super().__init__()
        self.shape, self.eps = (heads, head_size), eps
        self.weight = nn.Parameter(torch.empty(heads * head_size))
        self.bias = nn.Parameter(torch.empty(heads * head_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gain 1, bias 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, qk_BSHK: Tensor) -> Tensor:
        """(B, S, heads, K) to the same."""
        normed = F.layer_norm(qk_BSHK, self.shape[1:], eps=self.eps)
        return (normed * self.weight.view(self.shape) + self.bias.view(self.shape)).type_as(qk_BSHK)


class SelfAttention(nn.Module):
    """Grouped-query attention with one projection to all queries, keys and values, in this order, and no biases.

    kv_heads: heads of keys and values; query head h looks at h // (heads / kv_heads) of them (Ainslie et al. 2023).
    """

    def __init__(self, config: ModelConfig, has_qk_norm: bool = False):
        super().__init__()
        K, H, G = config.head_size, config.heads, config.num_kv_heads
        self.heads, self.kv_heads, self.head_size = H, G, K
        self.qkv = Linear(config.width, (H + 2 * G) * K)
        self.out = Linear(config.width, config.width)
        self.qk_norm = QKNorm(H + G, K, config.norm_eps) if has_qk_norm else None

    def forward(
        self,
        x_BSD: Tensor,
        packing: Packing,
        rotary: Rotary | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """(B, S, D) to (B, S, D); with a cache the mask of `packing` is that of `KVCache.attend`."""
        B, S, _ = x_BSD.shape
        H, G = self.heads, self.kv_heads
        qkv_BSHK = self.qkv(x_BSD).unflatten(2, (H + 2 * G, self.head_size))
        if self.qk_norm is not None or rotary is not None:
            qk_BSHK, v_BSGK = qkv_BSHK.split((H + G, G), dim=2)
            if self.qk_norm is not None:
                qk_BSHK = self.qk_norm(qk_BSHK)
            if rotary is not None:
                qk_BSHK = rotary.rotate(qk_BSHK)
            qkv_BSHK = torch.cat([qk_BSHK, v_BSGK], dim=2)
        if packing.positions_NL is not None and packing.slots is not None:
            N, L = packing.positions_NL.shape
            qkv_BSHK = qkv_BSHK.flatten(0, 1).index_select(0, packing.positions_NL.flatten()).unflatten(0, (N, L))
        q, k, v = qkv_BSHK.transpose(1, 2).split((H, G, G), dim=1)
        if cache is not None:
            return self.out(cache.attend(layer, q, k, v, packing.mask).transpose(1, 2).flatten(2))
        if packing.slots is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=packing.mask, enable_gqa=G != H)
            return self.out(y.transpose(1, 2).flatten(2))
        if G != H:
            k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
        y = causal_products(q, k, v).transpose(1, 2).flatten(2)
        return self.out(y.flatten(0, 1).index_select(0, packing.slots).view(B, S, -1))

"""Causal self-attention that never looks across packed documents.

B batch, S query positions, T key positions, D width, H heads, G heads of keys and values, K head size;
N documents of at most L tokens.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from mmtrain.config import ModelConfig
from mmtrain.models.cache import KVCache
from mmtrain.models.linear import Linear
from mmtrain.models.packing import Packing


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


def attend(qkv_BSHK: Tensor, kv_heads: int, packing: Packing) -> Tensor:
    """Causal attention within documents, by the kernel that `packing` was made for.

    qkv_BSHK: (B, S, H + 2 G, K), queries before keys before values. Returns (B, S, H, K).
    """
    if packing.positions_NL is not None and packing.slots is not None:
        return _by_document(qkv_BSHK, kv_heads, packing.positions_NL, packing.slots)
    heads = qkv_BSHK.shape[2] - 2 * kv_heads
    if packing.bounds is not None:
        return _varlen(qkv_BSHK, kv_heads, packing.bounds)
    q, k, v = qkv_BSHK.transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)
    if packing.blocks is not None:
        y = _flex(q.device.type)(q, k, v, block_mask=packing.blocks, enable_gqa=heads != kv_heads)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=packing.mask, enable_gqa=heads != kv_heads)
    return y.transpose(1, 2)


def _by_document(qkv_BSHK: Tensor, kv_heads: int, positions_NL: Tensor, slots: Tensor) -> Tensor:
    """Attention with one document per row; (B, S, H + 2 G, K) to (B, S, H, K)."""
    B, S = qkv_BSHK.shape[:2]
    H = qkv_BSHK.shape[2] - 2 * kv_heads
    qkv_NLHK = qkv_BSHK.flatten(0, 1).index_select(0, positions_NL.flatten()).unflatten(0, positions_NL.shape)
    q, k, v = qkv_NLHK.transpose(1, 2).split((H, kv_heads, kv_heads), dim=1)
    if kv_heads != H:
        k, v = (x.repeat_interleave(H // kv_heads, dim=1) for x in (k, v))
    y_NLHK = causal_products(q, k, v).transpose(1, 2)
    return y_NLHK.flatten(2).flatten(0, 1).index_select(0, slots).view(B, S, H, -1)


def _varlen(qkv_BSHK: Tensor, kv_heads: int, bounds: Tensor) -> Tensor:
    """Flash attention over documents of any length up to a row; (B, S, H + 2 G, K) to (B, S, H, K).

    Keys and values are repeated where queries share them: torch 2.11 has no `enable_gqa` here.
    """
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  (slow to import)

    B, S = qkv_BSHK.shape[:2]
    H = qkv_BSHK.shape[2] - 2 * kv_heads
    q, k, v = qkv_BSHK.flatten(0, 1).split((H, kv_heads, kv_heads), dim=1)
    if kv_heads != H:
        k, v = (x.repeat_interleave(H // kv_heads, dim=1) for x in (k, v))
    return varlen_attn(q, k, v, bounds, bounds, S, S, window_size=(-1, 0)).unflatten(0, (B, S))


@functools.cache
def _flex(device_type: str) -> Callable[..., Tensor]:
    """FlexAttention as one compiled kernel; uncompiled on CPU, where it has no backward pass."""
    return flex_attention if device_type == "cpu" else torch.compile(flex_attention, dynamic=False)


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
        H, G = self.heads, self.kv_heads
        qkv_BSHK = self.qkv(x_BSD).unflatten(2, (H + 2 * G, self.head_size))
        if self.qk_norm is not None or rotary is not None:
            qk_BSHK, v_BSGK = qkv_BSHK.split((H + G, G), dim=2)
            if self.qk_norm is not None:
                qk_BSHK = self.qk_norm(qk_BSHK)
            if rotary is not None:
                qk_BSHK = rotary.rotate(qk_BSHK)
            qkv_BSHK = torch.cat([qk_BSHK, v_BSGK], dim=2)
        if cache is None:
            return self.out(attend(qkv_BSHK, G, packing).flatten(2))
        q, k, v = qkv_BSHK.transpose(1, 2).split((H, G, G), dim=1)
        return self.out(cache.attend(layer, q, k, v, packing.mask).transpose(1, 2).flatten(2))

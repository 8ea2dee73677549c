"""The Llama family: pre-norm decoder with RMSNorm, SwiGLU, rotary positions, no biases, and grouped-query attention.

Source: Touvron et al. 2023 (LLaMA, arXiv 2302.13971, sec. 2.2; Llama 2, arXiv 2307.09288, sec. 2.2).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.config import ModelConfig
from mmtrain.models.attention import SelfAttention
from mmtrain.models.decoder import Block, Decoder
from mmtrain.models.linear import Linear


class GatedFeedForward(nn.Module):
    """SwiGLU: out(silu(gate(x)) * up(x)); gate and up are one product, in this order."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.wide = Linear(config.width, 2 * config.feed_forward_width)
        self.out = Linear(config.feed_forward_width, config.width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        gate, up = self.wide(x_BSD).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class Llama(Decoder):
    """The models of both papers; Llama 2 differs in sizes, context, and kv_heads of its largest."""

    def new_norm(self) -> nn.Module:
        return nn.RMSNorm(self.config.width, eps=self.config.norm_eps)

    def new_block(self) -> Block:
        c = self.config
        return Block(self.new_norm(), SelfAttention(c), self.new_norm(), GatedFeedForward(c), dropout=c.dropout)

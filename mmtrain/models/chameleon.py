"""The Chameleon family: CM3leon's successor, RMSNorm, SwiGLU, rotary positions, and norms on queries and keys.

Source: Chameleon team 2024 (arXiv 2405.09818) sec. 2.3, on the base of Llama 2. Their z-loss is `model.z_loss`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.config import ModelConfig
from mmtrain.models.attention import SelfAttention
from mmtrain.models.decoder import Block, Decoder


class GatedFeedForward(nn.Module):
    """SwiGLU: out(silu(gate(x)) * up(x)); gate and up are one product, in this order."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.wide = nn.Linear(config.width, 2 * config.feed_forward_width, bias=False)
        self.out = nn.Linear(config.feed_forward_width, config.width, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        gate, up = self.wide(x_BSD).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class Chameleon(Decoder):
    """The model of the paper, without its dropout and norm re-ordering."""

    def new_norm(self) -> nn.Module:
        return nn.RMSNorm(self.config.width, eps=self.config.norm_eps)

    def new_block(self) -> Block:
        c = self.config
        attention = SelfAttention(c.width, c.heads, qk_norm_eps=c.norm_eps)
        return Block(self.new_norm(), attention, self.new_norm(), GatedFeedForward(c))

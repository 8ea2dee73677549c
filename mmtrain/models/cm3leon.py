"""The CM3leon family: pre-norm decoder, LayerNorm without parameters, no biases, learned positions.

Source: Yu et al. 2023 (arXiv 2309.02591) sec. 2.3; what the paper leaves open follows the metaseq code
(feed-forward 4 x width, ReLU, tied head, residual outputs initialized to zero).
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.config import ModelConfig
from mmtrain.models.attention import SelfAttention
from mmtrain.models.decoder import Block, Decoder
from mmtrain.models.linear import Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class FeedForward(nn.Module):
    """out(activation(in(x)))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.wide = Linear(config.width, config.feed_forward_width)
        self.out = Linear(config.feed_forward_width, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.out(self.activation(self.wide(x_BSD)))


class Cm3leon(Decoder):
    """The paper's model."""

    def new_norm(self) -> nn.Module:
        return nn.LayerNorm(self.config.width, eps=self.config.norm_eps, elementwise_affine=False)

    def new_block(self) -> Block:
        c = self.config
        return Block(self.new_norm(), SelfAttention(c), self.new_norm(), FeedForward(c), dropout=c.dropout)

"""The CM3leon family: pre-norm decoder, LayerNorm without parameters, no biases, learned positions.

Source: Yu et al. 2023 (arXiv 2309.02591) sec. 2.3; what the paper leaves open follows the metaseq code
(feed-forward 4 x width, ReLU, tied head, residual outputs initialized to zero).
B batch, S sequence, D width, L layers, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmtrain.config import ModelConfig
from mmtrain.models.attention import KVCache, Packing, SelfAttention, pack_documents
from mmtrain.models.loss import Head, LossSums

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        ffn_width = config.ffn_width or 4 * config.width
        self.attention_norm = nn.LayerNorm(config.width, eps=config.norm_eps, elementwise_affine=False)
        self.attention = SelfAttention(config.width, config.heads)
        self.ffn_norm = nn.LayerNorm(config.width, eps=config.norm_eps, elementwise_affine=False)
        self.ffn_in = nn.Linear(config.width, ffn_width, bias=False)
        self.ffn_out = nn.Linear(ffn_width, config.width, bias=False)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x_BSD: Tensor, packing: Packing, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), packing, cache, layer)
        return x_BSD + self.ffn_out(self.activation(self.ffn_in(self.ffn_norm(x_BSD))))


class Cm3leon(nn.Module):
    """Decoder with its head; `forward` is the training step, `logits` and `decode` serve sampling."""

    def __init__(self, config: ModelConfig, vocabulary_size: int, max_positions: int):
        super().__init__()
        self.config = config
        self.max_positions = max_positions
        self.token_embedding = nn.Embedding(vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(max_positions, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, eps=config.norm_eps, elementwise_affine=False)
        self.head = Head(config.width, vocabulary_size, config.loss_chunk, config.z_loss)
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw all weights: truncated normal cut at 3 sigma; positions and residual outputs as configured."""
        generator = torch.Generator().manual_seed(seed)
        outputs = {id(weight) for block in self.blocks for weight in (block.attention.out.weight, block.ffn_out.weight)}
        for parameter in self.parameters():
            std = self.config.init_std
            if parameter is self.position_embedding.weight:
                std = self.config.position_init_std
            if std == 0 or (self.config.zero_init_outputs and id(parameter) in outputs):
                parameter.zero_()
            else:
                nn.init.trunc_normal_(parameter, 0.0, std, -3 * std, 3 * std, generator=generator)

    def forward(
        self, tokens: Tensor, document: Tensor, position: Tensor, targets: Tensor, loss_weight: Tensor, modality: Tensor
    ) -> LossSums:
        """Loss sums of a packed batch.

        tokens, targets, modality: (B, S) int64; document, position: (B, S) integers, document -1 = padding;
        loss_weight: (B, S) float32.
        """
        x_BSD = self.token_embedding(tokens) + self.position_embedding(position)
        packing = pack_documents(document)
        for block in self.blocks:
            if self.config.activation_checkpointing and self.training:
                x_BSD = checkpoint(block, x_BSD, packing, use_reentrant=False)
            else:
                x_BSD = block(x_BSD, packing)
        return self.head(self.final_norm(x_BSD), targets, loss_weight, modality)

    def logits(self, tokens: Tensor, document: Tensor, position: Tensor) -> Tensor:
        """(B, S, V) logits of a packed batch, without a cache."""
        x_BSD = self.token_embedding(tokens) + self.position_embedding(position)
        packing = pack_documents(document)
        for block in self.blocks:
            x_BSD = block(x_BSD, packing)
        return self.head(self.final_norm(x_BSD))

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` positions."""
        c = self.config
        return KVCache.empty(c.layers, batch, c.heads, capacity, c.width // c.heads, self.blocks[0].ffn_in.weight)

    def decode(self, tokens: Tensor, position: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) after the last of the new positions; the cache grows by them.

        tokens, position: (B, S) of the new positions; mask: (B, 1, S, T) bool over all T positions so far.
        """
        x_BSD = self.token_embedding(tokens) + self.position_embedding(position)
        for layer, block in enumerate(self.blocks):
            x_BSD = block(x_BSD, Packing(mask), cache, layer)
        cache.length += tokens.shape[1]
        return self.head(self.final_norm(x_BSD[:, -1:]))[:, 0]

"""What all families share: embedding, a stack of blocks, the head, and the three ways through them.

A family is a subclass of `Decoder` that says what its blocks and final norm are, and where positions enter.
B batch, S sequence, T positions so far, D width, V vocabulary.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmtrain.config import ModelConfig
from mmtrain.models.attention import QKNorm, Rotary, SelfAttention
from mmtrain.models.cache import KVCache
from mmtrain.models.loss import Head, LossSums
from mmtrain.models.packing import Packing, pack_documents
from mmtrain.models.signs import Signs


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); with norm_after norm(attention(x)) and so on.

    ffn: a module whose last product is its `out`. dropout: share of the outputs of attention and feed-forward layer
    that training sets to zero before they are added to x (Chameleon-7B; not with norm_after).
    """

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: SelfAttention,
        ffn_norm: nn.Module,
        ffn: nn.Module,
        norm_after: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.norm_after = norm_after
        self.dropout = dropout
        self.attention_norm = attention_norm
        self.attention = attention
        self.ffn_norm = ffn_norm
        self.ffn = ffn

    def forward(
        self, x_BSD: Tensor, packing: Packing, rotary: Rotary | None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        if self.norm_after:
            x_BSD = x_BSD + self.attention_norm(self.attention(x_BSD, packing, rotary, cache, layer))
            return x_BSD + self.ffn_norm(self.ffn(x_BSD))
        attended_BSD = self.attention(self.attention_norm(x_BSD), packing, rotary, cache, layer)
        x_BSD = x_BSD + F.dropout(attended_BSD, self.dropout, self.training)
        return x_BSD + F.dropout(self.ffn(self.ffn_norm(x_BSD)), self.dropout, self.training)


class CellEmbedding(nn.Module):
    """A learned vector per row and one per column of a picture (axial positions, as in DALL-E's decoder)."""

    def __init__(self, grid: int, width: int):
        super().__init__()
        self.grid = grid
        self.row = nn.Embedding(grid, width)
        self.column = nn.Embedding(grid, width)

    def forward(self, cell_BS: Tensor) -> Tensor:
        """(B, S) cells in raster order, -1 for none, to (B, S, D); none gives zeros."""
        inside_BS = cell_BS.clamp(min=0)
        x_BSD = self.row(inside_BS // self.grid) + self.column(inside_BS % self.grid)
        return x_BSD * (cell_BS >= 0)[..., None]


class Decoder(nn.Module, ABC):
    """Decoder with its head; `forward` is the training step, `logits` and `decode` serve sampling.

    max_positions: longest sequence, and the number of learned positions where the family has them.
    """

    def __init__(self, config: ModelConfig, vocabulary_size: int, max_positions: int):
        super().__init__()
        self.config = config
        self.max_positions = max_positions
        self.token_embedding = nn.Embedding(vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(max_positions, config.width) if not config.rotary else None
        self.cell_embedding = CellEmbedding(config.picture_grid, config.width) if config.picture_grid else None
        self.blocks = nn.ModuleList(self.new_block() for _ in range(config.layers))
        self.final_norm = self.new_norm()
        self.head = Head(config.width, vocabulary_size, config.loss_chunk, config.z_loss)
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight
        self.watched: Signs | None = None

    @abstractmethod
    def new_norm(self) -> nn.Module:
        """The family's norm over (…, D)."""

    @abstractmethod
    def new_block(self) -> Block:
        """One block of the family."""

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw all matrices: truncated normal cut at 3 sigma; positions and residual outputs as configured.

        Norms start at gain 1 and bias 0.
        """
        generator = torch.Generator().manual_seed(seed)
        outputs = {id(weight) for block in self.blocks for weight in (block.attention.out.weight, block.ffn.out.weight)}
        positions = {
            id(p) for part in (self.position_embedding, self.cell_embedding) if part for p in part.parameters()
        }
        for module in self.modules():
            if isinstance(module, nn.RMSNorm | QKNorm):
                module.reset_parameters()
        for parameter in self.parameters():
            if parameter.ndim < 2:
                continue
            std = self.config.init_std
            if id(parameter) in positions:
                std = self.config.position_init_std
            if std == 0 or (self.config.zero_init_outputs and id(parameter) in outputs):
                parameter.zero_()
            else:
                nn.init.trunc_normal_(parameter, 0.0, std, -3 * std, 3 * std, generator=generator)

    def watch(self, is_watched: bool) -> None:
        """From now on collect the warning signs of forward passes with gradients, from nothing; or stop."""
        self.watched = self.head.watched = Signs() if is_watched else None

    def take_signs(self) -> Signs | None:
        """What was collected since `watch(True)`, which ends here; None without a watch."""
        signs = self.watched
        self.watch(False)
        return signs

    def forward(
        self,
        tokens: Tensor,
        document: Tensor,
        position: Tensor,
        cell: Tensor,
        targets: Tensor,
        loss_weight: Tensor,
        modality: Tensor,
        starts: Tensor | None = None,
    ) -> LossSums:
        """Loss sums of a packed batch; attention as `model.attention` says.

        tokens, targets, modality: (B, S) int64; document, position, cell: (B, S) integers, document -1 = padding,
        cell -1 = no image token; loss_weight: (B, S) float32; starts: `document_starts`, which varlen needs.
        """
        packing = pack_documents(document, self.config.attention, starts)
        x_BSD = self._stack(tokens, packing, position, cell)
        if self.watched is not None and torch.is_grad_enabled():
            self.watched.add_output(x_BSD, document >= 0)
        return self.head(self.final_norm(x_BSD), targets, loss_weight, modality)

    def logits(self, tokens: Tensor, document: Tensor, position: Tensor, cell: Tensor) -> Tensor:
        """(B, S, V) logits of a packed batch, without a cache."""
        return self.head(self.final_norm(self._stack(tokens, pack_documents(document), position, cell)))

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` positions."""
        c = self.config
        return KVCache.empty(c.layers, batch, c.num_kv_heads, capacity, c.head_size, self.token_embedding.weight)

    def decode(self, tokens: Tensor, position: Tensor, cell: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """Logits (B, V) after the last of the new positions; arguments as of `extend`."""
        return self.head(self.extend(tokens, position, cell, cache, mask)[:, -1:])[:, 0]

    def extend(
        self, tokens: Tensor, position: Tensor, cell: Tensor, cache: KVCache, mask: Tensor | None = None
    ) -> Tensor:
        """(B, S, D) before the head, of new positions by which the cache grows.

        tokens, position, cell: (B, S) of the new positions; mask: as in `KVCache.attend`.
        """
        x_BSD, rotary = self._embed(tokens, position, cell)
        packing = Packing(mask)
        for layer, block in enumerate(self.blocks):
            x_BSD = block(x_BSD, packing, rotary, cache, layer)
        cache.length += tokens.shape[1]
        return self.final_norm(x_BSD)

    def _stack(self, tokens: Tensor, packing: Packing, position: Tensor, cell: Tensor) -> Tensor:
        """(B, S, D) after the last block."""
        x_BSD, rotary = self._embed(tokens, position, cell)
        has_dropout = self.config.dropout > 0  # then the recomputation must draw the same masks
        for block in self.blocks:
            if self.config.activation_checkpointing and self.training:
                x_BSD = checkpoint(
                    block, x_BSD, packing, rotary, use_reentrant=False, preserve_rng_state=has_dropout
                )
            else:
                x_BSD = block(x_BSD, packing, rotary)
        return x_BSD

    def _embed(self, tokens: Tensor, position: Tensor, cell: Tensor) -> tuple[Tensor, Rotary | None]:
        """Embedded tokens (B, S, D), and the rotary positions of a family that has them."""
        x_BSD = self.token_embedding(tokens)
        if self.cell_embedding is not None:
            x_BSD = x_BSD + self.cell_embedding(cell)
        if self.position_embedding is not None:
            return x_BSD + self.position_embedding(position), None
        c = self.config
        return x_BSD, Rotary.at(position, c.head_size, c.rope_base)

"""Bytes that the forward pass of a model keeps for its backward pass, counted from the operations of `mmtrain.models`.

Korthikanti et al. 2022 (arXiv 2205.05198, sec. 4) count a block in this way; here attention is fused, so that no
scores are kept, and the head keeps gradients instead of logits (models/loss.py).
B rows, S sequence, D width, H heads, G heads of keys and values, K head size, F feed-forward width, V vocabulary.
"""

from dataclasses import dataclass

from mmtrain.config import Config


@dataclass(frozen=True)
class Precision:
    """Bytes per element: of parameters, of the residual stream, and of what products take and give."""

    parameter: int
    stream: int
    product: int

    @classmethod
    def of(cls, config: Config, is_ddp: bool) -> "Precision":
        """DDP computes products in bf16 by autocast, DeepSpeed has bf16 parameters."""
        if config.engine.dtype == "fp32":
            return cls(4, 4, 4)
        return cls(4, 4, 2) if is_ddp else cls(2, 2, 2)

    @property
    def is_autocast(self) -> bool:
        """Whether parameters are cast at every use."""
        return self.parameter != self.product


def kept_by_block(config: Config, rows: int, precision: Precision, device: str) -> int:
    """Bytes that one block keeps without activation checkpointing."""
    c, S, p = config.model, config.stream.sequence_length, precision
    D, F, K, H, G = c.width, c.feed_forward_width, c.head_size, c.heads, c.num_kv_heads
    qkv = (H + 2 * G) * K
    per_token = 2 * (_kept_by_norm(config, p, device) + D * p.product)
    per_token += (qkv + D) * p.product + 4 * H  # and the softmax's log sum
    if c.rotary and p.product == 2:
        per_token += K * p.product  # cosines and sines, cast in each block
    if c.family == "chameleon":
        per_token += qkv * p.product + (H + G) * (K * p.product + 8)
    if G != H and c.attention != "flex" and device != "cpu":
        per_token += 2 * H * K * p.product
    per_token += (4 if c.gated else 2 if c.activation == "gelu" else 1) * F * p.product
    if c.dropout:
        per_token += 2 * D * (p.product if device == "cpu" else 1)
    kept = rows * S * per_token
    if has_dense_mask(config):
        kept += rows * S**2 * p.product  # torch adds the mask to the scores, as numbers
    return kept


def backward_of_block(config: Config, rows: int, precision: Precision) -> int:
    """Bytes of the gradients of activations that exist at a time in the backward pass of a block."""
    c = config.model
    widest = (5 if c.gated else 2) * c.feed_forward_width
    qkv = (c.heads + 2 * c.num_kv_heads) * c.head_size
    per_token = max(widest, 2 * qkv + c.width) * precision.product + 2 * c.width * precision.stream
    return rows * config.stream.sequence_length * per_token


def kept_around_blocks(config: Config, rows: int, precision: Precision, device: str) -> int:
    """Bytes of the embedding, the final norm and the head's gradient of its input, and of the mask."""
    c, S = config.model, config.stream.sequence_length
    per_token = _kept_by_norm(config, precision, device) + c.width * precision.stream
    if c.rotary:
        per_token += 4 * c.head_size
    return rows * S * per_token + (rows * S**2 if has_dense_mask(config) else 0)


def _kept_by_norm(config: Config, precision: Precision, device: str) -> int:
    """Bytes per token: its input; an RMSNorm on a CPU, where torch has no fused one, two copies in float32."""
    is_fused = config.model.family == "cm3leon" or device != "cpu"
    return config.model.width * (precision.stream if is_fused else 8)


def has_dense_mask(config: Config) -> bool:
    """Whether attention gets its documents as a (B, 1, S, S) mask.

    On a CPU auto lays short documents out one per row where that is cheaper to compute; what it keeps then depends on
    the data, and is counted here as with a mask.
    """
    return config.model.attention in ("auto", "sdpa")

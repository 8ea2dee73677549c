"""Which of their tensors make up which of ours: the names of OPT, Llama and Chameleon in transformers.

Rotary pairs are the two halves of a head on both sides, so no row changes its place.
D width, V vocabulary, P positions, H heads, G heads of keys and values, K head size, F feed-forward width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from mmtrain.config import ModelConfig

OPT_POSITION_OFFSET = 2
"""Rows in front of OPT's positions that no position of a full sequence uses."""


@dataclass(frozen=True)
class Piece:
    """A tensor of theirs; our parameter is its pieces, one after the other, flattened and in our shape.

    skip: rows in front that ours does not have.
    """

    name: str
    shape: tuple[int, ...]
    skip: int = 0


def tensor_layout(config: ModelConfig, vocabulary_size: int, positions: int) -> dict[str, tuple[Piece, ...]]:
    """Our parameters (`Decoder.named_parameters`, a tied head left out) by name, as pieces of theirs."""
    is_opt, stem = config.family == "cm3leon", "model.decoder" if config.family == "cm3leon" else "model"
    D, V = config.width, vocabulary_size
    parts: dict[str, tuple[Piece, ...]] = {"token_embedding.weight": (Piece(f"{stem}.embed_tokens.weight", (V, D)),)}
    if is_opt:
        rows = positions + OPT_POSITION_OFFSET
        learned = Piece(f"{stem}.embed_positions.weight", (rows, D), OPT_POSITION_OFFSET)
        parts["position_embedding.weight"] = (learned,)
    else:
        parts["final_norm.weight"] = (Piece(f"{stem}.norm.weight", (D,)),)
    if not config.tie_embeddings:
        parts["head.weight"] = (Piece("lm_head.weight", (V, D)),)
    for layer in range(config.layers):
        theirs = f"{stem}.layers.{layer}"
        block = dict(_opt_block(config, theirs) if is_opt else _llama_block(config, theirs))
        parts |= {f"blocks.{layer}.{name}": pieces for name, pieces in block.items()}
    return parts


def split(tensor: Tensor, pieces: tuple[Piece, ...]) -> Iterator[tuple[str, Tensor]]:
    """Our tensor as theirs; the rows that ours does not have become zero."""
    flat, start = tensor.flatten(), 0
    for piece in pieces:
        skipped = prod(piece.shape[1:]) * piece.skip
        size = prod(piece.shape) - skipped
        theirs = flat.new_zeros(piece.shape)
        theirs.view(-1)[skipped:] = flat[start : start + size]
        start += size
        yield piece.name, theirs


def _opt_block(config: ModelConfig, theirs: str) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    D, F = config.width, config.feed_forward_width
    yield "attention.qkv.weight", _qkv(config, theirs)
    yield "attention.out.weight", (Piece(f"{theirs}.self_attn.out_proj.weight", (D, D)),)
    yield "ffn.wide.weight", (Piece(f"{theirs}.fc1.weight", (F, D)),)
    yield "ffn.out.weight", (Piece(f"{theirs}.fc2.weight", (D, F)),)


def _llama_block(config: ModelConfig, theirs: str) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    D, F = config.width, config.feed_forward_width
    yield "attention_norm.weight", (Piece(f"{theirs}.input_layernorm.weight", (D,)),)
    yield "attention.qkv.weight", _qkv(config, theirs)
    yield "attention.out.weight", (Piece(f"{theirs}.self_attn.o_proj.weight", (D, D)),)
    if config.family == "chameleon":
        heads = (("q", config.heads), ("k", config.num_kv_heads))
        for kind in ("weight", "bias"):
            norms = tuple(Piece(f"{theirs}.self_attn.{x}_norm.{kind}", (n, config.head_size)) for x, n in heads)
            yield f"attention.qk_norm.{kind}", norms
    yield "ffn_norm.weight", (Piece(f"{theirs}.post_attention_layernorm.weight", (D,)),)
    yield "ffn.wide.weight", tuple(Piece(f"{theirs}.mlp.{x}_proj.weight", (F, D)) for x in ("gate", "up"))
    yield "ffn.out.weight", (Piece(f"{theirs}.mlp.down_proj.weight", (D, F)),)


def _qkv(config: ModelConfig, theirs: str) -> tuple[Piece, ...]:
    heads: Mapping[str, int] = {"q": config.heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    return tuple(
        Piece(f"{theirs}.self_attn.{x}_proj.weight", (n * config.head_size, config.width)) for x, n in heads.items()
    )

"""FLOPs of the decoder in closed form, by module and pass: three sums per training step, each with its convention.

One multiply-add = 2 FLOPs; an (m, k) by (k, n) product is 2mkn. The embedding look-up is no product; the
output head is one, tied or not. Norms, activations and softmax (under 1 %) are left out, as is usual.
Training = 3 x forward: the backward pass computes the gradients of inputs and of weights.

model_causal  what this model on this data needs: padding excluded, attention within documents only and
              causal, so a document of n tokens has n^2 / 2 scores (Megatron-LM's convention for packed data).
model_palm    PaLM (Chowdhery et al. 2022, appendix B): tokens x (6N + 12 L H Q T), attention over the whole
              row and not halved, N = parameters of matrix products; what most published MFU figures use.
              Padding is excluded here too: it is no progress under any convention.
hardware      what the kernels execute: padding included, attention as computed (a dense mask skips nothing),
              and what activation checkpointing computes a second time. Kernels that skip what documents and
              causality exclude count as if they skipped all of it.
"""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from mmtrain.config import ModelConfig, UserError

TOKEN_KINDS = ("text", "image", "retrieved", "special")
BACKWARD_AND_FORWARD = 3


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one optimizer step (or of one rank's part; parts add up with `+`)."""

    model_causal: int = 0
    model_palm: int = 0
    hardware: int = 0

    def __add__(self, other: "StepFlops") -> "StepFlops":
        return StepFlops(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class ModuleFlops:
    """FLOPs of one module: the forward pass, the backward pass, and what the backward pass computes once more."""

    forward: int
    backward: int
    recompute: int = 0

    @property
    def model(self) -> int:
        """What training needs, however it is done."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """What is executed."""
        return self.model + self.recompute


def _widths(model: ModelConfig) -> tuple[int, int, int]:
    """(layers, width, feed-forward width)."""
    if model.width % model.heads:
        raise UserError(f"model.width={model.width} is no multiple of model.heads={model.heads}; change one.")
    return model.layers, model.width, model.feed_forward_width


def forward_flops_per_token(model: ModelConfig, vocabulary_size: int) -> dict[str, int]:
    """Forward FLOPs of one token by module, without the scores, which depend on the length of the document.

    vocabulary_size: rows of the output head, padding rows included (they are multiplied as well).
    """
    layers, width, ffn_width = _widths(model)
    return {
        "embedding": 0,
        "attention_projections": 2 * layers * 2 * width * (width + model.num_kv_heads * model.head_size),
        "feed_forward": 2 * layers * (3 if model.gated else 2) * width * ffn_width,
        "head": 2 * width * vocabulary_size,
    }


def matmul_parameters(model: ModelConfig, vocabulary_size: int) -> int:
    """N of the 6ND rule: parameters that take part in matrix products (positions and a look-up do not)."""
    return sum(forward_flops_per_token(model, vocabulary_size).values()) // 2


def _scores_forward(model: ModelConfig, squared_lengths: int) -> int:
    """Forward FLOPs of full (not causal) attention: QK^T and the weighted sum, 2 n^2 d each, in every layer."""
    return 4 * model.layers * model.width * squared_lengths


def flops_by_module(
    model: ModelConfig, vocabulary_size: int, num_tokens: int, scores_forward: int
) -> dict[str, ModuleFlops]:
    """Training on `num_tokens` tokens by module: embedding, attention projections and scores, feed-forward, head.

    scores_forward: forward FLOPs of QK^T and the weighted sum in all layers, by the convention of the caller.
    """
    per_token = forward_flops_per_token(model, vocabulary_size)
    forward = {name: num_tokens * flops for name, flops in per_token.items()} | {"attention_scores": scores_forward}
    again = dict.fromkeys(forward, 0)
    if model.activation_checkpointing:
        blocks = ("attention_projections", "attention_scores", "feed_forward")
        again |= {name: forward[name] for name in blocks}
        # torch's recomputation of a block stops before its last product, unless a norm or a dropout mask follows it
        if not (model.norm_after or model.dropout):
            again["feed_forward"] -= forward["feed_forward"] // (3 if model.gated else 2)
    return {name: ModuleFlops(flops, 2 * flops, again[name]) for name, flops in forward.items()}


def _lengths_and_squares(lengths: Iterable[int]) -> tuple[int, int]:
    """Exact sums of n and n^2 in Python integers (numpy's would wrap silently)."""
    plain = [operator.index(length) for length in lengths]
    if any(length < 0 for length in plain):
        raise ValueError("a document length is negative")
    return sum(plain), sum(length * length for length in plain)


def forward_flops(model: ModelConfig, vocabulary_size: int, lengths: Iterable[int]) -> int:
    """Forward FLOPs over documents of these lengths, causal.

    Used for evaluation, and for sampling with a key-value cache, which does the same products one token at a time.
    """
    num_tokens, squares = _lengths_and_squares(lengths)
    linear = sum(forward_flops_per_token(model, vocabulary_size).values())
    return num_tokens * linear + _scores_forward(model, squares) // 2


def step_flops(
    model: ModelConfig,
    vocabulary_size: int,
    lengths: Iterable[int],
    num_rows: int,
    row_length: int,
    *,
    dense_attention: bool = True,
) -> StepFlops:
    """FLOPs of training on `num_rows` rows of `row_length` tokens that hold documents of `lengths` tokens.

    lengths: input tokens of every packed document (see `document_lengths`), padding left out.
    The rest, and the errors: see `flops_from_sums`.
    """
    num_tokens, squares = _lengths_and_squares(lengths)
    return flops_from_sums(
        model,
        vocabulary_size,
        num_tokens,
        squares,
        num_rows,
        row_length,
        dense_attention=dense_attention,
    )


def flops_from_sums(
    model: ModelConfig,
    vocabulary_size: int,
    num_tokens: int,
    squared_lengths: int,
    num_rows: int,
    row_length: int,
    *,
    dense_attention: bool = True,
    computed_squares: int | None = None,
) -> StepFlops:
    """`step_flops` from sums over documents, which add up over steps and ranks.

    num_tokens, squared_lengths: sum of the lengths of all documents, and of their squares.
    dense_attention: the kernel computes all row_length^2 scores and masks them (SDPA with a mask); False for
      kernels that skip what documents and causality exclude.
    computed_squares: scores per head that the kernel really computes, where it is neither of the two.
    Raises ValueError when the documents do not fit the rows.
    """
    row_tokens = num_rows * row_length
    if num_tokens > row_tokens:
        raise ValueError(f"documents of {num_tokens} tokens do not fit {num_rows} rows of {row_length}")

    causal_scores = _scores_forward(model, squared_lengths) // 2
    computed_scores = _scores_forward(model, num_rows * row_length**2) if dense_attention else causal_scores
    if computed_squares is not None:
        computed_scores = _scores_forward(model, computed_squares)

    def modules(tokens: int, scores: int) -> Iterable[ModuleFlops]:
        return flops_by_module(model, vocabulary_size, tokens, scores).values()

    return StepFlops(
        model_causal=sum(module.model for module in modules(num_tokens, causal_scores)),
        model_palm=sum(module.model for module in modules(num_tokens, _scores_forward(model, num_tokens * row_length))),
        hardware=sum(module.hardware for module in modules(row_tokens, computed_scores)),
    )


def split_by_kind(total: int, tokens: Mapping[str, int]) -> dict[str, int]:
    """Share `total` out in proportion to `tokens` by kind (text, image, retrieved, special).

    The parts are integers that add up to `total` exactly: every kind gets the difference of rounded-down
    cumulative shares. Raises ValueError for an unknown kind, or when there is work but no token.
    """
    unknown = set(tokens) - set(TOKEN_KINDS)
    if unknown:
        raise ValueError(f"unknown kinds of tokens {sorted(unknown)}; known: {TOKEN_KINDS}")
    counts = {kind: operator.index(tokens.get(kind, 0)) for kind in TOKEN_KINDS}
    num_tokens = sum(counts.values())
    if num_tokens == 0 and total:
        raise ValueError(f"{total} FLOPs cannot be shared out: there is no token")
    parts: dict[str, int] = {}
    seen = given = 0
    for kind, count in counts.items():
        seen += count
        share = total * seen // num_tokens if num_tokens else 0
        parts[kind] = share - given
        given = share
    return parts


def document_lengths(document: Any) -> np.ndarray:
    """Tokens per packed document, (n,) int64, of a batch's `document` ids (B, S) integer, -1 on padding.

    A document is a run of one id within a row, which is what the attention mask sees.
    """
    ids_BS = np.asarray(document)
    if ids_BS.size == 0:
        return np.zeros(0, np.int64)
    starts_BS = np.ones(ids_BS.shape, bool)
    starts_BS[:, 1:] = ids_BS[:, 1:] != ids_BS[:, :-1]
    starts = np.flatnonzero(starts_BS)
    lengths = np.diff(np.append(starts, ids_BS.size))
    return lengths[ids_BS.reshape(-1)[starts] >= 0].astype(np.int64)

"""Closed-form FLOPs against torch's counter on the meta device, and their invariants."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mmtrain.config import ModelConfig, UserError
from mmtrain.flops.count import (
    TOKEN_KINDS,
    StepFlops,
    document_lengths,
    flops_from_sums,
    forward_flops,
    matmul_parameters,
    split_by_kind,
    step_flops,
)
from mmtrain.models import build_model

V = 640
SHAPES = {
    "tiny": (ModelConfig(layers=2, width=64, heads=4), 640, 2, 48),
    "odd ffn, untied": (ModelConfig(layers=3, width=96, heads=3, ffn_width=200, tie_embeddings=False), 1280, 1, 70),
    "7B": (ModelConfig(layers=32, width=4096, heads=32), 64896, 1, 4096),
}


class PlainDecoder(torch.nn.Module):
    """A decoder written out here with explicit products, so that the counter sees all of them."""

    def __init__(self, model: ModelConfig, vocabulary_size: int):
        super().__init__()
        d, f = model.width, model.ffn_width or 4 * model.width
        self.heads = model.heads
        self.embedding = torch.nn.Parameter(torch.empty(vocabulary_size, d))
        shapes = ((d, 3 * d), (d, d), (d, f), (f, d)) * model.layers
        self.layers = torch.nn.ParameterList(torch.nn.Parameter(torch.empty(*shape)) for shape in shapes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding[tokens]
        B, S, D = x.shape
        for qkv, out, up, down in zip(*[iter(self.layers)] * 4, strict=True):
            q, k, v = ((x @ qkv).view(B, S, 3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
            x = x + y.transpose(1, 2).reshape(B, S, D) @ out
            x = x + (x @ up).relu() @ down
        return x @ self.embedding.T


def measured(model: ModelConfig, vocabulary_size: int, rows: int, length: int) -> tuple[int, int]:
    """FLOPs of a training step as torch counts them: (products with weights, products within attention)."""
    with torch.device("meta"):
        decoder = PlainDecoder(model, vocabulary_size)
        tokens = torch.zeros(rows, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        decoder(tokens).sum().backward()
    by_op = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    scores = sum(flops for op, flops in by_op.items() if "bmm" in op)
    return sum(by_op.values()) - scores, scores


@pytest.mark.parametrize("name", SHAPES)
def test_closed_form_is_what_torch_counts(name):
    model, vocabulary_size, rows, length = SHAPES[name]
    linear, scores = measured(model, vocabulary_size, rows, length)
    counted = step_flops(model, vocabulary_size, [length] * rows, rows, length)
    assert counted.hardware == pytest.approx(linear + scores, rel=1e-3)
    assert counted.model_palm == pytest.approx(linear + scores, rel=1e-3)
    assert counted.model_causal == pytest.approx(linear + scores / 2, rel=1e-3)


def test_packed_documents_cost_what_they_cost_apart():
    model = ModelConfig(layers=2, width=64, heads=4)
    apart = sum(linear + scores / 2 for linear, scores in (measured(model, V, 1, n) for n in (5, 20, 30)))
    assert step_flops(model, V, [5, 20, 30], 1, 64).model_causal == pytest.approx(apart, rel=1e-3)


VARIANTS = {
    "cm3leon": {},
    "chameleon": {"family": "chameleon"},
    "llama": {"family": "llama", "ffn_width": 200},
    "llama, grouped": {"family": "llama", "kv_heads": 2},
    "llama, dropout": {"family": "llama", "dropout": 0.1},
    "chameleon, grouped, norms after": {"family": "chameleon", "kv_heads": 1, "norm_after": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chunk", [16, 4096])
def test_hardware_flops_are_what_our_own_model_executes(recompute, chunk, variant):
    settings = {"activation_checkpointing": recompute, "loss_chunk": chunk} | VARIANTS[variant]
    model = ModelConfig(layers=2, width=64, heads=4, **settings)
    decoder = build_model(model, V, 48, "meta")
    with torch.device("meta"):
        keys = ("tokens", "document", "position", "cell", "targets", "modality")
        batch = {key: torch.zeros(2, 48, dtype=torch.long) for key in keys}
        batch["loss_weight"] = torch.ones(2, 48)
    decoder.train()
    with FlopCounterMode(display=False) as counter:
        decoder(**batch).total.backward()
    counted = step_flops(model, V, [48, 48], 2, 48)
    assert counted.hardware == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_products_are_those_of_every_parameter_but_positions_and_norms(variant):
    model = ModelConfig(layers=2, width=64, heads=4, **VARIANTS[variant])
    named = build_model(model, V, 48, "meta").named_parameters()
    in_products = sum(p.numel() for name, p in named if p.ndim == 2 and "position" not in name)
    assert matmul_parameters(model, V) == in_products


def test_palm_540b_reaches_its_published_mfu():
    # Chowdhery et al. 2022 table 3 and appendix B: 6144 TPU v4 at 275e12, 238.3k tokens/s, 46.2 % MFU.
    parameters, layers, heads, head_size, length = 540.35e9, 118, 48, 256, 2048
    model = ModelConfig(layers=layers, width=heads * head_size, heads=heads)
    attention = step_flops(model, 0, [length], 1, length).model_palm - 6 * matmul_parameters(model, 0) * length
    flops_per_token = 6 * parameters + attention / length  # PaLM's own N: it shares keys and values among heads
    assert 238.3e3 * flops_per_token / (6144 * 275e12) == pytest.approx(0.462, abs=5e-4)


def test_padding_costs_hardware_but_is_no_progress():
    model = ModelConfig()
    full, half = step_flops(model, V, [64, 64], 2, 64), step_flops(model, V, [64], 2, 64)
    assert half.model_causal * 2 == full.model_causal and half.model_palm * 2 == full.model_palm
    assert half.hardware == full.hardware


def test_counts_do_not_overflow_numpy_integers():
    lengths = document_lengths(torch.zeros(4, 8, dtype=torch.int32)) * 10**9
    assert forward_flops(ModelConfig(), V, lengths) > 2**63


def test_heads_must_divide_width():
    with pytest.raises(UserError, match="heads=3"):
        step_flops(ModelConfig(width=64, heads=3), V, [4], 1, 4)


@given(st.integers(0, 10**25), st.lists(st.integers(0, 10**12), min_size=4, max_size=4).filter(any))
def test_shares_by_kind_add_up_exactly(total, counts):
    parts = split_by_kind(total, dict(zip(TOKEN_KINDS, counts, strict=True)))
    assert sum(parts.values()) == total
    for kind, count in zip(TOKEN_KINDS, counts, strict=True):
        assert abs(parts[kind] * sum(counts) - total * count) <= sum(counts)


def test_ranks_add_up():
    model = ModelConfig()
    parts = [step_flops(model, V, [10, 6], 1, 16), step_flops(model, V, [12], 1, 16)]
    assert sum(parts, StepFlops()) == step_flops(model, V, [10, 6, 12], 2, 16)
    sums = flops_from_sums(model, V, 28, 100 + 36 + 144, 2, 16)
    assert sums == sum(parts, StepFlops())


def test_documents_that_do_not_fit_their_rows_are_an_error():
    with pytest.raises(ValueError, match="do not fit"):
        step_flops(ModelConfig(), V, [17], 1, 16)


def test_document_lengths_leave_padding_out_and_stop_at_row_ends():
    assert document_lengths(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 2, -1, -1]])).tolist() == [2, 3, 2, 1]
    assert document_lengths(torch.full((2, 3), -1)).tolist() == []

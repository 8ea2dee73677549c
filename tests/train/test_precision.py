"""engine.dtype=auto."""

import pytest
import torch

from mmtrain.config.compose import compose
from mmtrain.flops import measured_matmul_rate
from mmtrain.tokens import has_fast_bf16
from mmtrain.train import precision
from mmtrain.train.precision import choose_dtype
from tests.train.small_run import WORLD

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("able", "settings", "before", "expected"),
    [
        (True, ["engine=zero1"], None, "bf16"),
        (False, ["engine=zero1"], None, "fp32"),
        (True, ["engine=ddp"], None, "bf16"),
        (True, ["engine=zero0"], None, "fp32"),  # gradients would be accumulated in bf16
        (False, ["engine=zero2", "engine.reduce_dtype=bf16"], None, "bf16"),
        (False, ["engine=zero1"], "bf16", "bf16"),  # the run goes on as it began, on a slower machine, too
        (True, ["engine=ddp"], "fp32", "fp32"),
    ],
)
def test_bf16_is_chosen_where_it_is_worth_it(monkeypatch, able, settings, before, expected):
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: able)
    assert choose_dtype(compose([*settings, "engine.dtype=auto"]), WORLD, before) == expected


@pytest.mark.parametrize(
    ("able", "expected"),
    [({"avx512_f": True}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({}, False)],
)
def test_processors_without_bf16_instructions_are_known(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert has_fast_bf16(CPU) is expected


def test_fast_means_fast():
    """On this machine: products in bf16 take less time than in float32, or more."""
    ratio = measured_matmul_rate(torch.bfloat16, seconds=0.2) / measured_matmul_rate(torch.float32, seconds=0.2)
    assert (ratio > 1.2) if has_fast_bf16(CPU) else (ratio < 1), ratio

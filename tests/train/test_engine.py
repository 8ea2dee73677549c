"""All engines train alike, and every state can be continued by every engine on any number of ranks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FP32 = ("ddp", "zero0", "zero1", "zero2", "zero3")
BF16 = ("ddp-bf16", "zero1-bf16", "zero2-bf16", "zero3-bf16")
OFFLOAD = ("zero1-offload", "zero2-offload", "zero3-offload", "zero3-offload-parameters")
OFFLOAD_BF16 = ("zero1-offload-bf16", "zero3-offload-all-bf16")
MUON = ("ddp-muon", "ddp-muon-bf16")
ALL = FP32 + BF16 + OFFLOAD + OFFLOAD_BF16 + MUON
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # on a busy machine


def run_cases(ranks: int, out: Path) -> dict[str, Any]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"]
    script = str(Path(__file__).with_name("engine_cases.py"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, script, str(out)], env=environment, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / f"world-{ranks}.json").read_text())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("engines")
    return run_cases(2, out) | {"out": out}


@pytest.fixture(scope="module")
def one_rank(two_ranks: dict[str, Any]) -> dict[str, Any]:
    """After `two_ranks`, whose state it continues."""
    return run_cases(1, two_ranks["out"])


def assert_close(rows: list[list[float]], expected: list[list[float]], relative: float = 1e-5) -> None:
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert all(math.isclose(a, b, rel_tol=relative) for a, b in zip(row, other, strict=True)), (rows, expected)


@pytest.mark.parametrize("name", FP32 + OFFLOAD)
def test_losses_and_norms_are_those_of_plain_torch_on_one_process(name: str, two_ranks, one_rank) -> None:
    assert_close(two_ranks["straight"][name]["losses"], one_rank["naive"])


def test_muon_is_that_of_plain_torch_on_one_process(two_ranks, one_rank) -> None:
    """Muon orthogonalizes in bf16, which a different order of the gradient's sum shows at 1e-3."""
    assert_close(two_ranks["straight"]["ddp-muon"]["losses"], one_rank["naive_muon"], relative=1e-3)


@pytest.mark.parametrize("name", FP32)
def test_two_micro_batches_are_one_batch(name: str, two_ranks, one_rank) -> None:
    assert_close(two_ranks["accumulated"][name], one_rank["naive"])


@pytest.mark.parametrize("name", BF16 + OFFLOAD_BF16)
def test_bf16_follows_fp32_closely(name: str, two_ranks, one_rank) -> None:
    assert_close(two_ranks["straight"][name]["losses"], one_rank["naive"], relative=0.05)
    losses = [[loss] for loss, _ in two_ranks["straight"][name]["losses"]]
    assert_close(losses, [[loss] for loss, _ in one_rank["naive"]], relative=1e-3)


@pytest.mark.parametrize("where", ["fresh", "rolled_back"])
@pytest.mark.parametrize("name", ALL)
def test_a_fresh_or_a_used_engine_continues_bit_for_bit(name: str, where: str, two_ranks) -> None:
    assert two_ranks["straight"][name][f"{where}_loads_what_was_saved"]
    assert two_ranks["straight"][name][f"{where}_goes_on_exactly"]


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2"])
def test_another_engine_continues_stage_3(name: str, two_ranks) -> None:
    assert_close(two_ranks["continued"][name], two_ranks["straight"]["zero3"]["losses"][3:])


def test_stage_3_continues_stage_1_in_bf16(two_ranks) -> None:
    assert_close(two_ranks["continued"]["zero3-bf16"], two_ranks["straight"]["zero1-bf16"]["losses"][3:])


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero3"])
def test_one_rank_continues_what_two_began(name: str, two_ranks, one_rank) -> None:
    assert_close(one_rank["continued"][name], two_ranks["straight"]["zero3"]["losses"][3:])


@pytest.mark.parametrize("name", ALL)
def test_a_gradient_that_is_not_finite_changes_nothing_and_a_huge_one_is_clipped(name: str, two_ranks) -> None:
    facts = two_ranks["poisoned"][name]
    assert len(facts) == 10 and all(facts.values()), facts


@pytest.mark.parametrize("name", ALL)
def test_the_effective_settings_are_those_that_were_asked(name: str, two_ranks) -> None:
    effective = two_ranks["straight"][name]["effective"]
    if name.startswith("ddp"):
        assert (effective["products"] == "bfloat16") == ("bf16" in name) and effective["parameters"] == "float32"
        return
    zero, runs = effective["zero_optimization"], effective["runs"]
    assert zero["stage"] == int(name[4]) and effective["bf16"]["enabled"] == ("bf16" in name)
    assert (zero["offload_optimizer"] is not None) == (name in OFFLOAD + OFFLOAD_BF16 and "param" not in name)
    assert runs["masters"] == effective["data_types"]["grad_accum_dtype"] == "fp32"
    assert effective["communication_data_type"] == "fp32"
    assert not zero["overlap_comm"] and effective["gradient_clipping"] == (0.2 if zero["stage"] else 0)


def test_a_setting_that_deepspeed_turned_around_is_named(two_ranks) -> None:
    assert "asked for zero_optimization.overlap_comm=False and took True" in two_ranks["tampered"]

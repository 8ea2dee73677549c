"""Every engine, stage, number of ranks and of micro-batches gives the same losses and weights as plain torch.

    python -m tests.train.test_parity    measures, and prints the table of docs/explanation/engine.md
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.parity_cases import BF16_ENGINES, CLIP, FP32_ENGINES, STEPS, Case, Rows, cases, recomputing_cases

ROOT = Path(__file__).parents[2]
FP32 = {"loss": 1e-6, "norm": 1e-6, "weights": 1e-5, "elements": 2e-5}
BF16 = {"loss": 1e-3, "norm": 5e-2, "weights": 1e-1}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # on a busy machine


def run_cases(out: Path) -> dict[str, Rows]:
    """Losses and norms of all runs by name; their weights are files in `out`."""
    script = str(Path(__file__).with_name("parity_cases.py"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, script, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr[-4000:]
    legs = [json.loads((out / f"rows-{leg}.json").read_text()) for leg in range(4)]
    return {name: rows for leg in legs for name, rows in leg.items()}


def measure(out: Path) -> dict[str, Any]:
    """All runs, and how far each is from the reference; as a file too, where $PARITY_JSON names one.

    loss, norm: largest |a - b| / |b| of all steps. weights: largest norm(a - b) / norm(b) of all tensors at the end;
    elements: largest |a - b| / max |b| of a tensor.
    """
    rows = run_cases(out)
    reference, differences = load_file(out / "plain.safetensors"), {}
    for case in (case for ranks in (1, 2, 4) for case in cases(ranks) if case.steps == STEPS):
        weights = load_file(out / f"{case.name}.safetensors")
        assert weights.keys() == reference.keys()
        pairs = [(weights[name].double(), tensor.double()) for name, tensor in reference.items()]
        both = zip(rows[case.name], rows["plain"], strict=True)
        steps = [[abs(a - b) / abs(b) for a, b in zip(row, expected, strict=True)] for row, expected in both]
        differences[case.name] = {
            "loss": max(loss for loss, _ in steps),
            "norm": max(norm for _, norm in steps),
            "weights": max(float((a - b).norm() / b.norm()) for a, b in pairs),
            "elements": max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs),
        }
    facts = {"rows": rows, "differences": differences}
    if file := os.environ.get("PARITY_JSON"):
        Path(file).write_text(json.dumps(facts, indent=1))
    return facts


def assert_within(limits: dict[str, float], differences: dict[str, dict[str, float]], chosen: list[Case]) -> None:
    assert chosen
    for case in chosen:
        too_far = {key: differences[case.name][key] for key in limits if not differences[case.name][key] <= limits[key]}
        assert not too_far, case.name


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def parity(out: Path) -> dict[str, Any]:
    return measure(out)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("engine", FP32_ENGINES)
def test_every_engine_in_float32_is_plain_torch(engine: str, ranks: int, parity) -> None:
    chosen = [case for case in cases(ranks) if case.engine == engine and case.steps == STEPS]
    assert_within(FP32, parity["differences"], chosen)


@pytest.mark.parametrize("engine", BF16_ENGINES)
def test_bf16_stays_within_its_tolerance_of_float32(engine: str, parity) -> None:
    assert_within(BF16, parity["differences"], [case for case in cases(2) if case.engine == engine])


def test_some_steps_were_clipped_and_some_were_not(parity) -> None:
    clipped = [norm > CLIP for _, norm in parity["rows"]["plain"]]
    assert 5 <= sum(clipped) <= STEPS - 5, parity["rows"]["plain"]


@pytest.mark.parametrize("case", [c for c in recomputing_cases() if c.recomputes], ids=lambda case: case.name)
def test_recomputed_activations_change_no_bit(case: Case, parity, out: Path) -> None:
    other = Case(case.engine, case.ranks, case.accumulation, case.dropout)
    assert parity["rows"][case.name] == parity["rows"][other.name]
    left, right = (load_file(out / f"{c.name}.safetensors") for c in (case, other))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_dropout_was_at_work(parity) -> None:
    assert parity["rows"][Case("zero3", 2, 2, 0.1).name][0] != parity["rows"][Case("zero1", 2, 2).name][0]


def test_a_run_continues_on_4_then_2_then_1_then_4_ranks_in_other_stages(parity) -> None:
    rows = sum((parity["rows"][f"leg-{leg}"] for leg in range(4)), [])
    straight = parity["rows"][Case("zero3", 4, 4).name]
    for row, expected in zip(rows, straight, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def table(facts: dict[str, Any]) -> str:
    """Largest differences by engine, over ranks and micro-batches."""
    lines = ["| Engine | loss | gradient norm | weights (norm) | weights (element) |", "|---|---|---|---|---|"]
    groups = {engine: f"{engine}-ranks" for engine in (*FP32_ENGINES, *BF16_ENGINES)}
    for engine, prefix in groups.items():
        rows = {name: row for name, row in facts["differences"].items() if name.startswith(prefix)}
        for suffix in ("", ", summed in bf16"):
            chosen = [row for name, row in rows.items() if name.endswith("bf16-reduction") == bool(suffix)]
            if chosen:
                largest = [max(row[key] for row in chosen) for key in ("loss", "norm", "weights", "elements")]
                lines.append(f"| {engine}{suffix} | " + " | ".join(f"{value:.1e}" for value in largest) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(table(measure(Path(folder))))

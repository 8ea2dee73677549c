"""Warning signs against plain autograd in float64, and through every engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmtrain.models.decoder import Decoder
from mmtrain.models.signs import ROWS, describe_signs
from tests.models.test_decoder import build, packed_batch, small

Z_LOSS = 0.01


def watched_sums(model: Decoder, *batches: dict[str, Tensor]) -> Tensor:
    model.watch(True)
    for batch in batches:
        model(**batch).total.backward()
    return model.take_signs().sums


def naive_sums(model: Decoder, batch: dict[str, Tensor]) -> Tensor:
    """By hooks on the plain logits; in a float64 copy of the model."""
    model = build(model.config).double()
    seen = {}
    model.blocks[-1].register_forward_hook(lambda *args: seen.update(output=args[2]))
    model.final_norm.register_forward_hook(lambda *args: seen.update(hidden=args[2]))
    logits = model.logits(*(batch[name] for name in ("tokens", "document", "position", "cell")))
    log_z, weight, modality = logits.logsumexp(-1), batch["loss_weight"], batch["modality"]
    loss = log_z - logits.gather(-1, batch["targets"][..., None])[..., 0]
    (gradient,) = torch.autograd.grad(((loss + Z_LOSS * log_z**2) * weight).sum(), seen["hidden"])
    groups = [(seen["output"].square().mean(-1), batch["document"] >= 0), (log_z, weight > 0)]
    groups += [(gradient.square().sum(-1), (weight > 0) & (modality == kind)) for kind in range(3)]
    return torch.tensor([[values[where].sum().item(), where.sum().item()] for values, where in groups])


@pytest.mark.parametrize("variant", ["cm3leon", "chameleon", "chameleon grouped, norms after"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sums_over_two_micro_batches_are_those_of_plain_autograd(variant: str, checkpointing: bool) -> None:
    model = build(small(variant, z_loss=Z_LOSS, loss_chunk=25, activation_checkpointing=checkpointing))
    batches = packed_batch(0), packed_batch(1)
    expected = sum(naive_sums(model, batch) for batch in batches)
    assert (expected[:, 1] > 0).all()
    torch.testing.assert_close(watched_sums(model, *batches), expected.double(), rtol=1e-5, atol=0)


def test_watching_changes_neither_losses_nor_gradients() -> None:
    batch, model = packed_batch(), build(small())
    expected = [model(**batch).total]
    expected += torch.autograd.grad(expected[0], list(model.parameters()))
    model.watch(True)
    found = [model(**batch).total]
    found += torch.autograd.grad(found[0], list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_evaluation_is_not_watched_and_a_watch_ends_when_it_is_read() -> None:
    model = build(small())
    assert model.take_signs() is None
    model.watch(True)
    with torch.no_grad():
        model(**packed_batch(1))
    assert model.watched.sums is None
    model(**packed_batch())
    assert torch.equal(model.take_signs().sums, watched_sums(model, packed_batch()))
    assert model.take_signs() is None and model.head.watched is None


def test_the_log_row_has_roots_of_means_and_nothing_where_there_are_no_targets() -> None:
    sums = torch.tensor([[8.0, 2], [6, 4], [0, 0], [18, 2], [4, 1]])
    row = {"output_rms": 2.0, "log_z": 1.5, "gradient_special_rms": None}
    assert describe_signs(sums) == row | {"gradient_text_rms": 3.0, "gradient_image_rms": 2.0}


@pytest.mark.slow
def test_every_engine_sees_what_the_bare_model_sees(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    script, out = str(Path(__file__).with_name("signs_cases.py")), tmp_path / "signs.json"
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, script, str(out)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    sums = {name: torch.tensor(values, dtype=torch.float64) for name, values in json.loads(out.read_text()).items()}
    expected = sums.pop("bare")
    assert expected.shape == (len(ROWS), 2) and len(sums) == 9
    for name, found in sums.items():
        tolerance = 0.05 if name.endswith("bf16") else 1e-5
        assert torch.allclose(found, expected, rtol=tolerance, atol=0), (name, found, expected)

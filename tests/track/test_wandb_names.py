"""Names on W&B, and steps that are done twice."""

import math

import pytest

from mmtrain.track.wandb_names import Naming, wandb_key


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("tokens", "tokens"),
        ("flops_total", "train/flops"),
        ("loss_text", "train/loss_text"),
        ("val_loss", "val/loss"),
        ("lr", "optim/lr"),
        ("hfu", "perf/hfu"),
        ("spikes", "health/spikes"),
        ("data/web/share", "data/web/share"),
    ],
)
def test_metric_names(key, name):
    assert wandb_key(key) == name


def test_a_number_that_is_not_finite_is_sent_as_such():
    row = Naming()({"step": 1, "time": 7.5, "loss": None, "lr": 1.0, "non_finite": {"loss": "nan"}})
    assert math.isnan(row.pop("train/loss")) and row == {"step": 1, "_timestamp": 7.5, "optim/lr": 1.0}


def test_flops_beyond_64_bits_are_sent_as_floats():
    named = Naming()({"step": 1, "flops_total": 10**24, "loss": math.inf})
    assert isinstance(named["train/flops"], float) and named["train/flops"] == 1e24


def test_a_validation_that_is_made_up_for_is_not_done_twice():
    naming = Naming()
    assert naming({"step": 9, "loss": 2.0}) == {"step": 9, "train/loss": 2.0}
    assert naming({"step": 9, "val_loss": 2.5}) == {"step": 9, "val/loss": 2.5}
    assert naming({"step": 8, "tokens": 4, "loss": 2.0}) == {"step": 8, "tokens": 4, "redone/train/loss": 2.0}
    assert naming({"step": 10, "loss": 1.0, "val_loss": 1.5}) == {"step": 10, "train/loss": 1.0, "val/loss": 1.5}

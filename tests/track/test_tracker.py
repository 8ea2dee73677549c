"""The tracker feeds every sink and never stops training."""

import pytest

from mmtrain.config import Config
from mmtrain.track.metrics import read_metrics
from mmtrain.track.tracker import Tracker


@pytest.fixture
def config():
    config = Config(name="t")
    config.track.wandb = "disabled"
    return config


def test_rows_reach_file_and_console(tmp_path, config, capsys):
    tracker = Tracker(tmp_path, config, total_steps=20, run_id="r", resumed_step=0)
    tracker.log(10, {"tokens": 5120, "loss": float("nan"), "loss_text": 1.5, "mfu_causal": None})
    tracker.log(20, {"tokens": 10240, "loss": 0.25})
    tracker.close(0)
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [None, 0.25]
    out = capsys.readouterr().out
    assert "step 10/20  text 1.500" in out and "step 20/20  loss 0.2500" in out


def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path, config, capsys):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    tracker = Tracker(tmp_path, config, total_steps=2, run_id="r", resumed_step=0)
    tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"loss": 2.0})
    tracker.close(0)
    assert capsys.readouterr().out.count("could not write metrics.jsonl") == 1


def test_a_folder_that_cannot_be_written_does_not_stop_training(tmp_path, config, capsys):
    (tmp_path / "file").write_text("")
    tracker = Tracker(tmp_path / "file" / "run", config, total_steps=1, run_id="r", resumed_step=0)
    tracker.log(1, {"loss": 1.0})
    tracker.close(1)
    assert "could not write metrics.jsonl" in capsys.readouterr().out

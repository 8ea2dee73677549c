"""A grid with one planted failure, killed in the middle and started again, on a budget in FLOPs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmtrain.config.compose import load_frozen
from mmtrain.track import read_metrics
from mmtrain.train.budget import flops_per_step
from mmtrain.train.run import Artifacts
from tests.e2e.conftest import Smoke, environment, mmtrain
from tests.e2e.test_recovery import kill_all

pytestmark = pytest.mark.slow
BUDGET = 5e9  # about 41 steps
WORDS = ["train", "-m", "experiment=smoke", "name=grid", "engine=ddp", "engine.ranks=1", "track.wandb=disabled"]
WORDS += ["seed=1,2", "optim.lr=1e-3,3e-3", f"train.flops={BUDGET}", "train.checkpoint_every=1", "sweep.parallel=2"]


def training_total(run: Path) -> int:
    return json.loads((run / "ledger.json").read_text())["training_total"]


def test_the_flops_of_a_step_are_those_that_the_ledger_booked(smoke: Smoke) -> None:
    config = load_frozen(smoke.run / "config.yaml")
    assert sum(flops_per_step(config, Artifacts.load(smoke.run), config.train.steps)) == training_total(smoke.run)


def test_a_killed_grid_goes_on_with_what_is_missing(smoke: Smoke, tmp_path: Path) -> None:
    shutil.copytree(smoke.folder / "data", tmp_path / "data")
    folder = tmp_path / "runs" / "grid"
    (folder / "seed=1,lr=0.003" / "environment.json").mkdir(parents=True)  # a run cannot be opened here
    process = subprocess.Popen(
        [sys.executable, "-m", "mmtrain", *WORDS], cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL
    )
    try:
        first = folder / "seed=1,lr=0.001"
        while not list(first.glob("checkpoints/step-*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        kill_all(process)
    done = mmtrain(*WORDS, cwd=tmp_path)
    jobs = json.loads((folder / "sweep.json").read_text())["jobs"]
    assert done.returncode == 1, done.stdout + done.stderr
    assert [job["state"] for job in jobs] == ["finished", "failed", "finished", "finished"]
    assert jobs[1]["name"] == "seed=1,lr=0.003" and jobs[1]["reason"].startswith("IsADirectoryError")
    for job in jobs[::2] + jobs[3:]:
        run = tmp_path / job["run"]
        steps = [row["step"] for row in read_metrics(run / "metrics.jsonl")]
        assert steps == list(range(1, load_frozen(run / "config.yaml").train.steps + 1))
        assert abs(training_total(run) / BUDGET - 1) < 0.02  # half a step, and no more than that
        assert json.loads((run / "ledger.json").read_text())["flops"]["repeated"] == 0
    starts = (first / "attempts.jsonl").read_text().count('"start"')
    assert starts == 2 and os.path.exists(first / "logs" / "sweep.log")

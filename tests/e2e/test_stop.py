"""Asked to stop, a run saves and goes on later without losing a step; killed, it goes on by itself where it may."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmtrain.train.launch import free_port
from mmtrain.train.status import read_status
from tests.e2e.conftest import CHECKPOINT_EVERY, SETTINGS, STEPS, Smoke, environment, mmtrain
from tests.e2e.test_recovery import last_of_step, rows, started, wait_for_step, workers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(smoke: Smoke, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands run; the data is there already."""
    made = tmp_path_factory.mktemp("stop")
    shutil.copytree(smoke.folder / "data", made / "data")
    return made


def attempts(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]


def test_a_stopped_run_goes_on_and_no_step_is_lost_or_repeated(folder: Path, smoke: Smoke) -> None:
    run, log = folder / "runs" / "stopped", folder / "stopped.log"
    with started(folder, log, "name=stopped") as process:
        wait_for_step(run, 4, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0, log.read_text()
        assert workers(run) == {}
    status = read_status(run)
    assert status and status.state == "stopped" and 4 <= status.step < STEPS
    assert f"stopped at step {status.step} of {STEPS}" in log.read_text()

    done = mmtrain("train", *SETTINGS, "name=stopped", cwd=folder)
    assert f"resuming at step {status.step} of {STEPS}" in done.stdout
    assert [row["step"] for row in rows(run) if "loss" in row] == list(range(1, STEPS + 1))
    assert all(last_of_step(run, step) == last_of_step(smoke.run, step) for step in range(1, STEPS + 1))
    assert json.loads((run / "ledger.json").read_text())["flops"]["repeated"] == 0
    assert [row["cause"] for row in attempts(run)[1::2]] == ["stopped", "finished"]


def test_a_run_that_may_restart_outlives_a_killed_rank(folder: Path, smoke: Smoke) -> None:
    run, log = folder / "runs" / "restarted", folder / "restarted.log"
    with started(folder, log, "name=restarted", "engine.restarts=2") as process:
        wait_for_step(run, CHECKPOINT_EVERY + 3, process)
        os.kill(workers(run)[1], signal.SIGKILL)
        assert process.wait(timeout=200) == 0, log.read_text()
    assert "restart 1 of 2 on 2 ranks" in log.read_text()
    ends = attempts(run)[1::2]
    assert [row["cause"] for row in ends][-1] == "finished" and len(ends) == 2
    assert ends[0]["step"] >= CHECKPOINT_EVERY
    assert last_of_step(run, STEPS) == last_of_step(smoke.run, STEPS)


def test_a_prepared_run_is_trained_by_torchrun(folder: Path, smoke: Smoke) -> None:
    prepared = mmtrain("train", "prepare", *SETTINGS, "name=torchrun", cwd=folder)
    run = Path(prepared.stdout.splitlines()[-1])
    assert run == folder / "runs" / "torchrun" and not (run / "checkpoints").exists()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    worker = ["--master_port", str(free_port()), "-m", "mmtrain.train.worker", "--run-dir", str(run)]
    done = subprocess.run([*torchrun, *worker], cwd=folder, env=environment(), capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert last_of_step(run, STEPS) == last_of_step(smoke.run, STEPS)

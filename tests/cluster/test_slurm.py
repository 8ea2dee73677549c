"""launch/slurm.sbatch on a real Slurm of two nodes: saved on a signal, queued again, killed, ends as if nothing was;
and a grid as an array."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.box import Box
from tests.cluster.conftest import (
    CHECKPOINT_EVERY,
    SETTINGS,
    STEPS,
    assert_equal,
    need,
    step_of,
    wait_for,
)
from tests.cluster.slurm import Slurm, missing
from tests.e2e.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(600)]
WITHOUT_GPUS = ("--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1")
SIGNAL_AT, CRASH_AT = CHECKPOINT_EVERY + 2, 2 * CHECKPOINT_EVERY + 4


@pytest.fixture(scope="module")
def slurm(lasting_box: Box) -> Slurm:
    need(missing())
    slurm = Slurm(lasting_box)
    slurm.start()
    return slurm


@pytest.fixture
def checkout(straight: Path) -> Path:
    """The folder of the other runs as a checkout: the real scripts, with the Python of the tests."""
    folder = straight.parents[1]
    if not (folder / "launch").exists():
        shutil.copytree(ROOT / "launch", folder / "launch")
        programs = folder / "bin"
        programs.mkdir()
        for name, words in {"python": "", "mmtrain": "-m mmtrain"}.items():
            (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
            (programs / name).chmod(0o755)
        lines = f"mmtrain_root={folder}\nexport PATH={programs}:$PATH\n"
        (folder / "launch" / "environment.sh").write_text(lines)
    return folder


def test_a_job_that_is_saved_and_queued_again_and_then_loses_a_node_ends_as_if_nothing_was(
    slurm: Slurm, box: Box, checkout: Path, straight: Path, table: Callable[..., None]
) -> None:
    run, log = straight.with_name("slurm"), checkout / "slurm.log"
    words = (*WITHOUT_GPUS, f"--output={log}", "launch/slurm.sbatch", *SETTINGS, "name=slurm")
    job = slurm.submit(checkout, *words, PYTHONPATH=str(ROOT), WANDB_MODE="offline")

    def wait_until(done: Callable[[dict[str, str]], bool], what: str) -> None:
        def reached() -> bool:
            state = slurm.job(job)
            assert state["JobState"] not in ("FAILED", "CANCELLED", "TIMEOUT"), log.read_text()
            return done(state)

        wait_for(reached, what, every=0.05)

    wait_until(lambda state: step_of(run) >= SIGNAL_AT, f"at step {SIGNAL_AT}")
    slurm("scancel", "--signal=USR1", job)  # what Slurm itself sends before the time limit
    wait_until(lambda state: state["Restarts"] == "1", "queued again")
    assert SIGNAL_AT <= step_of(run) < CRASH_AT

    wait_until(lambda state: step_of(run) >= CRASH_AT, f"at step {CRASH_AT}")
    box.crash("node-2")
    wait_until(lambda state: state["Restarts"] == "2", "queued again by Slurm")
    last = step_of(run)
    assert last < STEPS
    box.power_on("node-2")
    slurm.start_node("node-2")
    # Slurm keeps the order to end the job on the lost node; when that hits the new start, there is one more.
    wait_until(lambda state: state["JobState"] == "COMPLETED", "finished")
    assert_equal(run, straight)
    said = log.read_text()
    assert "step 1/" in said and "stopped and saved: queueing" in said and said.count("resuming at step") >= 2
    table("Slurm: USR1 before the time limit", "saved, queued again, goes on; bit-equal at the end", "so", lost=0)
    table("Slurm: crash of one node of two", "queued again by Slurm, goes on; bit-equal at the end", "so")


def test_an_array_has_a_task_for_each_job_of_a_grid(slurm: Slurm, box: Box, checkout: Path) -> None:
    """Tasks 0 and 1 train side by side, a node each; 2 is a mistake, which stops no other."""
    log = checkout / "array-%a.log"
    words = (*WITHOUT_GPUS, "--nodes=1", "--array=0-2", f"--output={log}", "launch/slurm.sbatch")
    grid = ("-m", "experiment=smoke", "train.steps=4", "seed=1,2", "name=array")
    job = slurm.submit(checkout, *words, *grid, PYTHONPATH=str(ROOT), WANDB_MODE="offline")
    states: dict[str, str] = {}

    def ended() -> bool:
        lines = slurm("squeue", "--noheader", "--states=all", f"--jobs={job}", "--array", "--format=%K %T").splitlines()
        states.update(line.split() for line in lines)
        return len(states) == 3 and set(states.values()) <= {"COMPLETED", "FAILED"}

    wait_for(ended, "all tasks ended", every=0.2)
    assert states == {"0": "COMPLETED", "1": "COMPLETED", "2": "FAILED"}
    assert "sweep.job=2 is not in this grid of 2 jobs" in (checkout / "array-2.log").read_text()
    for seed in (1, 2):
        run = checkout / "runs" / "array" / f"seed={seed}"
        assert step_of(run) == 4 and f"seed: {seed}" in (run / "config.yaml").read_text()

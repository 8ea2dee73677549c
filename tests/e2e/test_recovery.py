"""Killed without warning, a run continues by the same command and ends where an uninterrupted one does."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from mmtrain.track import read_metrics
from mmtrain.track.metrics import read_rows
from tests.e2e.conftest import CHECKPOINT_EVERY, SETTINGS, STEPS, Smoke, environment, mmtrain
from tests.track.conftest import records

pytestmark = pytest.mark.slow
FILES = ("tensors-00000-of-00002.safetensors", "tensors-00001-of-00002.safetensors")
RANK_KILLED_AT = CHECKPOINT_EVERY + 5
GROUP_KILLED_AT = 2 * CHECKPOINT_EVERY + 5
MEASURED = re.compile(r"time|ranks/.*|seconds/.*|.*seconds|tokens_per_second|mfu_.*|hfu")


def rows(run: Path) -> list[dict[str, Any]]:
    """Whole rows of metrics.jsonl; a row that is just being written is left out."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def last_of_step(run: Path, step: int) -> dict[str, Any]:
    """What was last logged of a step, without what a clock measured."""
    row = next(row for row in read_metrics(run / "metrics.jsonl") if row["step"] == step)
    return {key: value for key, value in row.items() if not MEASURED.fullmatch(key)}


def workers(run: Path) -> dict[int, int]:
    """Process id of each worker of this run by its rank on this machine."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            if "mmtrain.train.worker" in words and str(run.resolve()) in words:
                rank = next((word.partition("=")[2] for word in words if word.startswith("--local_rank=")), None)
                if rank is not None:
                    found[int(rank)] = int(folder.name)
    return found


@contextlib.contextmanager
def started(folder: Path, log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """`mmtrain train WORDS`; nothing of it survives."""
    command = [sys.executable, "-m", "mmtrain", "train", *SETTINGS, *words]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=file, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        kill_all(process)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and all that it started, as a power cut would."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while not (found := rows(run)) or found[-1]["step"] < step:
        assert process.poll() is None and time.monotonic() < deadline, f"stopped before step {step}: {found[-1:]}"
        time.sleep(0.005)


@dataclass(frozen=True)
class Killed:
    """A run that lost a rank, then all its processes, then its newest checkpoint, and was finished after that."""

    run: Path
    code_without_a_rank: int
    seconds_without_a_rank: float
    survivors: dict[int, int]
    steps_at_kills: tuple[int, int]
    damaged: Path
    resumed: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def killed(smoke: Smoke, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    shutil.copytree(smoke.folder / "data", folder / "data")
    run, log = folder / "runs" / "killed", folder / "log"

    with started(folder, log, "name=killed") as process:
        wait_for_step(run, RANK_KILLED_AT, process)
        os.kill(workers(run)[1], signal.SIGKILL)
        start = time.monotonic()
        code = process.wait(timeout=120)
        seconds = time.monotonic() - start
        survivors = workers(run)
    first = rows(run)[-1]["step"]

    with started(folder, log, "name=killed") as process:
        wait_for_step(run, GROUP_KILLED_AT, process)
        kill_all(process)
    while workers(run):  # killed, but the kernel takes a moment
        time.sleep(0.05)
    second = rows(run)[-1]["step"]

    damaged = sorted((run / "checkpoints").glob("step-*"))[-1]
    with open(damaged / FILES[1], "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"???")
    # What a kill in the middle of a checkpoint leaves behind.
    half = run / "checkpoints" / f".step-{STEPS:08d}.0badcafe.partial"
    half.mkdir()
    (half / FILES[0]).write_bytes(b"half")

    resumed = mmtrain("train", *SETTINGS, "name=killed", cwd=folder)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    return Killed(run, code, seconds, survivors, (first, second), damaged, resumed)


def test_the_run_was_really_killed_in_the_middle(killed: Killed) -> None:
    assert RANK_KILLED_AT <= killed.steps_at_kills[0] < STEPS
    assert GROUP_KILLED_AT <= killed.steps_at_kills[1] < STEPS


def test_without_one_rank_the_others_stop_and_the_command_fails(killed: Killed) -> None:
    assert killed.code_without_a_rank == 1
    assert killed.seconds_without_a_rank < 60
    assert killed.survivors == {}


def test_it_ends_with_the_losses_of_an_uninterrupted_run_bit_for_bit(killed: Killed, smoke: Smoke) -> None:
    for step in range(1, STEPS + 1):
        assert last_of_step(killed.run, step) == last_of_step(smoke.run, step)


@pytest.mark.parametrize("name", FILES)
def test_it_ends_with_the_tensors_of_an_uninterrupted_run(name: str, killed: Killed, smoke: Smoke) -> None:
    last = Path("checkpoints", f"step-{STEPS:08d}", name)
    found, expected = load_file(killed.run / last), load_file(smoke.run / last)
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in expected)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(killed: Killed) -> None:
    complaint = next(line for line in killed.resumed.stderr.splitlines() if killed.damaged.name in line)
    assert f"{FILES[1]} is not what its manifest says" in complaint
    before = int(killed.damaged.name.removeprefix("step-")) - CHECKPOINT_EVERY
    assert f"resuming at step {before} of {STEPS}" in killed.resumed.stdout


def test_lost_steps_are_booked_as_repeated_and_not_as_progress(killed: Killed, smoke: Smoke) -> None:
    ledger, straight = (json.loads((run / "ledger.json").read_text()) for run in (killed.run, smoke.run))
    assert ledger["training_total"] == straight["training_total"]
    assert ledger["flops"]["repeated"] > 0 == straight["flops"]["repeated"]


def test_tracking_continues_the_same_run(killed: Killed) -> None:
    run_id = (killed.run / "run_id").read_text().strip()
    folders = list((killed.run / "wandb").glob("offline-run-*"))
    assert folders and all(folder.name.endswith(run_id) for folder in folders)
    sent = [record["history"]["item"]["step"] for record in records(killed.run) if record["type"] == "history"]
    with open(killed.run / "metrics.jsonl", "rb") as file:
        assert sent == [row["step"] for row in read_rows(file)]

"""The box that the tests share, and one run on this machine alone, which all others must equal."""

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mmtrain.track import read_metrics
from tests.cluster.box import Box, kill, missing
from tests.conftest import cannot
from tests.e2e.conftest import environment, mmtrain
from tests.e2e.test_recovery import rows

STEPS, CHECKPOINT_EVERY = 40, 10
SETTINGS = ("experiment=smoke", f"train.steps={STEPS}", f"train.checkpoint_every={CHECKPOINT_EVERY}")
COMPARED = re.compile(r"(val_)?loss(_\w+)?|grad_norm|tokens|lr")
OURS = ("mmtrain", "deepspeed.launcher", "pdsh")
LIMIT_SECONDS = 200.0


def need(reason: str) -> None:
    """Skip, or in the CI fail, for a reason that is not empty."""
    if reason:
        cannot(reason)


@pytest.fixture(scope="session")
def lasting_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """Three hosts: head, where commands are typed, node-1 and node-2."""
    need(missing())
    box = Box(tmp_path_factory.mktemp("box"))
    try:
        box.up()
        yield box
    finally:
        box.down()


@pytest.fixture
def box(lasting_box: Box) -> Iterator[Box]:
    """The three hosts, all on and reachable again after the test."""
    yield lasting_box
    for name in lasting_box.names:
        if lasting_box.pid(name) is None:
            lasting_box.power_on(name)
        lasting_box.plug(name)


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, lasting_box: Box) -> Path:
    """Run directory of an uninterrupted run of two ranks on this machine; runs of the other tests are beside it."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "hostfile").write_text("node-1 slots=1\nnode-2 slots=1\n")
    done = mmtrain("train", *SETTINGS, "name=straight", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "straight"


@contextlib.contextmanager
def started(box: Box, run: Path, *words: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """`mmtrain train WORDS` on the head, on both nodes; nothing of it stays on any host."""
    train = [sys.executable, "-m", "mmtrain", "train", *SETTINGS, f"name={run.name}", "engine.hostfile=hostfile"]
    folder = run.parents[1]
    command = [*box.command("head"), "env", f"--chdir={folder}", *train, *words]
    with open(log_of(run), "ab") as log:
        process = subprocess.Popen(command, env=environment() | variables, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        for name in box.names:
            kill(*left_over(box, name))
        process.wait()


def log_of(run: Path) -> Path:
    """Where the output of `started` goes."""
    return run.parents[1] / f"{run.name}.log"


def left_over(box: Box, name: str) -> dict[int, list[str]]:
    """Processes of training on a host by process id."""
    return {pid: words for pid, words in box.processes(name).items() if any(w in word for word in words for w in OURS)}


def wait_for(
    condition: Callable[[], Any], what: str, process: "subprocess.Popen[bytes] | None" = None, every: float = 0.005
) -> None:
    """Wait until a condition, asked for each `every` seconds, holds, while the process runs."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert process is None or process.poll() is None, f"the command ended with {process.returncode}, not {what}"
        assert time.monotonic() < deadline, f"not {what} after {LIMIT_SECONDS:.0f} s"
        time.sleep(every)


def step_of(run: Path) -> int:
    """The last step that was logged; 0 before the first."""
    return next((int(row["step"]) for row in reversed(rows(run))), 0)


def losses(run: Path) -> dict[int, dict[str, Any]]:
    """What a run computed, by step; a repeated step counts as it was at last."""
    return {
        row["step"]: {name: value for name, value in row.items() if COMPARED.fullmatch(name)}
        for row in read_metrics(run / "metrics.jsonl")
    }


def assert_equal(run: Path, straight: Path) -> None:
    """A run has the losses of every step and the tensors at the end of the uninterrupted one, bit for bit."""
    found, expected = losses(run), losses(straight)
    assert len(expected) == STEPS and all("loss" in row for row in expected.values())
    assert found == expected
    checkpoint = Path("checkpoints", f"step-{STEPS:08d}")
    files = sorted(file.name for file in (straight / checkpoint).glob("*.safetensors"))
    assert files and files == sorted(file.name for file in (run / checkpoint).glob("*.safetensors"))
    for name in files:
        tensors, wanted = load_file(run / checkpoint / name), load_file(straight / checkpoint / name)
        assert tensors.keys() == wanted.keys() and all(tensors[key].equal(wanted[key]) for key in wanted)

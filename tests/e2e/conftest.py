"""One small run through the real command line, made once and looked at by many tests."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Long enough to be killed twice in the middle; otherwise the smoke experiment as it is.
STEPS, CHECKPOINT_EVERY = 60, 15
SETTINGS = ("experiment=smoke", f"train.steps={STEPS}", f"train.checkpoint_every={CHECKPOINT_EVERY}")
# In a new network namespace even the loopback interface is down: bring it up (SIOCSIFFLAGS), then run the command.
LOOPBACK_ONLY = """
import fcntl, os, socket, struct, sys
with socket.socket() as s:
    fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", 0x41) + bytes(24))
os.execvp(sys.argv[1], sys.argv[1:])
"""
NO_NETWORK = ("unshare", "-rn", sys.executable, "-c", LOOPBACK_ONLY)


PLANTED = "canary0123456789abcdef0123456789abcdef"


def environment() -> dict[str, str]:
    secrets = {"WANDB_API_KEY": PLANTED, "SOME_TOKEN": PLANTED}
    return os.environ | secrets | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}


def mmtrain(*words: str, cwd: Path, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`mmtrain WORDS` in a process of its own, its exit code and output; before: words in front of the command."""
    command = [*before, sys.executable, "-m", "mmtrain", *words]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=240)


def network_can_be_cut() -> bool:
    try:
        return subprocess.run([*NO_NETWORK, "true"], capture_output=True, timeout=30).returncode == 0
    except OSError:
        return False


@dataclass(frozen=True)
class Smoke:
    """`folder` is where the command ran: runs/smoke and data are below it."""

    folder: Path
    output: str
    network_was_cut: bool

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "smoke"


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    """An uninterrupted run on two ranks, without a network where this machine lets us cut it."""
    folder = tmp_path_factory.mktemp("smoke")
    cut = network_can_be_cut()
    done = mmtrain("train", *SETTINGS, cwd=folder, before=NO_NETWORK if cut else ())
    assert done.returncode == 0, done.stdout + done.stderr
    return Smoke(folder, done.stdout + done.stderr, cut)

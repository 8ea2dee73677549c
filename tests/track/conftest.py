"""Run directories without a model, and W&B without its server."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmtrain.config import Config
from mmtrain.config.compose import freeze

RUN_ID = "abc12345"
# A training process that logs rows FIRST to LAST, or until there is RUN/enough: RUN FIRST LAST SECONDS_PER_ROW END
# END: "close", or "kill" for kill -9. Prints the seconds that it spent in the tracker, but for its end, and in all.
TRAINING = """
import os, sys, time
from pathlib import Path
from mmtrain.config.compose import load_frozen
from mmtrain.track.tracker import Tracker
run, first, last, pace, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
started, spent = time.perf_counter(), 0.0
tracker = Tracker(run, load_frozen(run / "config.yaml"), last, "abc12345", first - 1)
for step in range(first, last + 1):
    before = time.perf_counter()
    tracker.log(step, {"tokens": 512 * step, "flops_total": 10**9 * step, "loss": 1 / step, "step_seconds": pace})
    spent += time.perf_counter() - before
    time.sleep(pace)
    if (run / "enough").exists():
        break
print("spent", spent, time.perf_counter() - started, flush=True)
if end == "kill":
    os.kill(os.getpid(), 9)
tracker.alert("Training finished", "all of it", "INFO")
tracker.close(0)
"""
Process = subprocess.CompletedProcess[str]


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # whatever goes wrong, no test calls a real server
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Path]:
    """`new_run(mode, **settings)`: a run directory that has not been trained yet."""

    def make(mode: str, **settings: Any) -> Path:
        run = tmp_path / "runs" / "small"
        run.mkdir(parents=True)
        config = Config(name="small", **settings)
        config.track.wandb = mode
        freeze(config, run / "config.yaml")
        (run / "run_id").write_text(RUN_ID)
        return run

    return make


def start_training(run: Path, first: int, last: int, pace: float = 0.0, end: str = "close") -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", TRAINING, str(run), str(first), str(last), str(pace), end]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def mmtrain(*words: str, **environment: str) -> Process:
    command = [sys.executable, "-m", "mmtrain", *words]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def records(run: Path) -> list[dict[str, Any]]:
    """All records of the offline files of a run, by W&B's own inspector."""
    found = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        found += [json.loads(line) for line in output.splitlines()]
    return found

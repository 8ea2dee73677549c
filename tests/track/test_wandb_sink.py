"""W&B with real offline files, read back by wandb's own inspector, and with a dead server."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmtrain.config import TrackConfig
from mmtrain.track.wandb_sink import WandbSink, resolve_mode, wandb_key

CANARY = "canary" + "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # whatever goes wrong, no test calls a real server
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def records(run_dir: Path) -> list[dict]:
    """All records of the offline runs below `run_dir`, by `wandb leet inspect`."""
    found = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(path)]
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        found += [json.loads(line) for line in output.splitlines()]
    return found


def test_an_offline_run_holds_every_row_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_SECRET", CANARY)
    monkeypatch.setattr(sys, "argv", ["mmtrain", f"--token={CANARY}"])
    said = []
    config = {"name": "run", "password": CANARY, "notes": f"key={CANARY}", "model": {"layers": 2}}
    sink = WandbSink(tmp_path, "run", config, TrackConfig(tags=["t"]), "abc123", said.append)
    for step in range(1, 21):
        sink.log({"step": step, "tokens": step * 512, "loss": 1 / step, "val_loss": None})
    sink.close(0)
    sink.close(0)

    kept = records(tmp_path)
    text = json.dumps(kept)
    rows = [record for record in kept if record.get("type") == "history"]
    assert len(rows) == 20 and "train/loss" in text and "val/loss" not in text
    assert "abc123" in text and '"layers"' in text.replace("\\", "")
    files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert files and not any(CANARY.encode() in path.read_bytes() for path in files)
    assert said == [] and sink.sync_command.startswith("wandb sync ")


DEAD_SERVER = """
import sys, time
from pathlib import Path
from mmtrain.config import TrackConfig
from mmtrain.track import wandb_sink
wandb_sink.INIT_SECONDS = 3.0
sink = wandb_sink.WandbSink(Path(sys.argv[1]), "run", {}, TrackConfig(), "abc124")
sink.log({"step": 1, "tokens": 10, "loss": 0.5})
sink.close(1)
print("mode", sink.mode)
"""


def test_a_dead_server_means_offline_within_bounds(tmp_path, monkeypatch, table):
    # In a process of its own with a wandb service of its own: wandb reads its environment only once.
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    start = time.monotonic()
    command = [sys.executable, "-c", DEAD_SERVER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert time.monotonic() - start < 40
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and lines[0].endswith("logging offline.") and lines[1] == "mode offline"
    assert "0" * 40 not in done.stdout + done.stderr
    assert sum(record.get("type") == "history" for record in records(tmp_path)) == 1
    table("W&B's server does not answer", "said once, logged offline; training goes on, no row is lost", "so")


OFFLINE = """
import atexit, sys
from pathlib import Path
from mmtrain.config import TrackConfig
from mmtrain.track.wandb_sink import WandbSink
calls = []
watched = {"socket.getaddrinfo": 0, "socket.gethostbyname": 0, "socket.connect": 1}
sys.addaudithook(lambda event, args: calls.append(str(args[watched[event]])) if event in watched else None)
atexit.register(lambda: print(sink.mode, [call for call in calls if "/" not in call and "127.0.0.1" not in call]))
sink = WandbSink(Path(sys.argv[1]), "run", {}, TrackConfig(), "abc126")
sink.log({"step": 1, "tokens": 10, "loss": 0.5})
sink.close(0)
"""


def test_offline_asks_no_server(tmp_path, monkeypatch):
    for name in ("WANDB_BASE_URL", "WANDB_SERVICE", "WANDB_ERROR_REPORTING"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-c", OFFLINE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.splitlines()[-1] == "offline []"


def test_online_without_a_key_asks_nobody(tmp_path):
    said = []
    sink = WandbSink(tmp_path, "run", {}, TrackConfig(wandb="online"), "abc125", said.append)
    sink.close()
    assert sink.mode == "offline" and len(said) == 1 and "WANDB_API_KEY" in said[0]


def test_disabled_writes_nothing(tmp_path):
    sink = WandbSink(tmp_path, "run", {}, TrackConfig(wandb="disabled"), "x")
    sink.log({"step": 1, "tokens": 1})
    sink.close()
    assert list(tmp_path.iterdir()) == []


def test_a_fault_while_logging_is_said_once_and_never_raised(tmp_path):
    class Broken:
        def log(self, row):
            raise RuntimeError("gone")

    said = []
    sink = WandbSink(tmp_path, "run", {}, TrackConfig(wandb="disabled"), "x", said.append)
    sink._run = Broken()
    sink.log({"step": 1})
    sink.log({"step": 2})
    assert len(said) == 1 and "gone" in said[0]


def test_auto_goes_online_only_with_a_login(monkeypatch, tmp_path):
    assert resolve_mode("auto") == "offline"
    monkeypatch.delenv("WANDB_BASE_URL")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40 + "\n")
    (tmp_path / "netrc").chmod(0o600)
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "disabled" and resolve_mode("offline") == "offline"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("tokens", "tokens"),
        ("loss_text", "train/loss_text"),
        ("val_loss", "val/loss"),
        ("lr", "optim/lr"),
        ("hfu", "perf/hfu"),
    ],
)
def test_metric_names(key, name):
    assert wandb_key(key) == name

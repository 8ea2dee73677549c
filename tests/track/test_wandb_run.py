"""W&B with real offline files, read back by wandb's own inspector, and with a server on this machine that fails."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmtrain.config import TrackConfig
from mmtrain.track.follow import alone
from mmtrain.track.metrics import read_metrics
from mmtrain.track.wandb_run import resolve_mode
from mmtrain.track.wandb_sink import WandbSink
from tests.track.conftest import RUN_ID, mmtrain, records, start_training
from tests.track.loopback import Loopback

CANARY = "canary" + "0123456789abcdef" * 2
KEY = "0123456789abcdef" * 2 + "01234567"


def wait_until_sent(run: Path) -> None:
    """Until the process that follows the run has come, and ended."""
    until = time.monotonic() + 60
    while not list(run.glob("wandb/offline-run-*")) and time.monotonic() < until:
        time.sleep(0.05)
    with alone(run, wait=True):
        pass


@pytest.mark.slow
def test_every_row_is_offline_after_kill_9_and_a_resume_and_then_sent_as_one_run(new_run, monkeypatch):
    run = new_run("offline")
    start_training(run, 1, 30, end="kill").wait(60)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 31, "tok')  # what the kill cut
    wait_until_sent(run)
    start_training(run, 21, 40).wait(60)

    kept = records(run)
    assert {record["run"]["run_id"] for record in kept if record["type"] == "run"} == {RUN_ID}
    rows = [record["history"]["item"] for record in kept if record["type"] == "history"]
    assert [row["_step"] for row in rows] == list(range(50))
    assert [row["step"] for row in rows] == [*range(1, 31), *range(21, 41)]
    # The curves have every step once; what was done again has a name of its own.
    curve = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert curve == {row["step"]: row["loss"] for row in read_metrics(run / "metrics.jsonl")}
    assert [row["step"] for row in rows if "redone/train/loss" in row] == list(range(21, 31))
    alerts = [record["alert"]["title"] for record in kept if record["type"] == "alert"]
    assert alerts == ["Training died", "Training finished"]
    axes = {metric.get("name") or metric["glob_name"]: metric.get("step_metric") for metric in metrics(kept)}
    assert axes == {"tokens": None, "*": "tokens", "train/flops": "tokens", "val/*": "train/flops"}

    (run / "status.json").write_text('{"state": "finished"}')
    with Loopback() as server:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert "all 50 rows" in mmtrain("sync", str(run.parent)).stdout
        assert [row["step"] for row in server.rows(RUN_ID)] == [row["step"] for row in rows]
        assert server.run_ids == {RUN_ID} and server.finished[-1] == 0
        calls = len(server.calls)
        assert "nothing new" in mmtrain("sync", str(run)).stdout and len(server.calls) == calls


def metrics(kept):
    return [record["metric"] for record in kept if record["type"] == "metric"]


@pytest.mark.slow
def test_no_secret_is_in_any_file_and_all_else_is_in_the_run(new_run, monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_SECRET", CANARY)
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    repository = tmp_path / "repository"
    subprocess.run(["git", "init", "-q", repository], check=True)
    remote = f"https://user:{CANARY}@example.org/x.git"
    subprocess.run(["git", "-C", repository, "remote", "add", "origin", remote], check=True)
    monkeypatch.chdir(repository)
    run = new_run("offline", notes=f"a try, token={CANARY}")
    text = (run / "config.yaml").read_text().replace("group: ''", "group: grid").replace("tags: []", "tags: [x]")
    (run / "config.yaml").write_text(text)
    for step in (10, 20):
        (run / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        (run / f"checkpoints/step-{step:08d}/MANIFEST.json").write_text("{}")
    samples = run / "samples" / "image-step20"
    samples.mkdir(parents=True)
    samples.joinpath("a.png").write_bytes(PNG)
    record = {"samples": [{"prompt": "a red circle", "file": "a.png"}, {"prompt": f"token={CANARY}", "text": "x"}]}
    samples.joinpath("samples.json").write_text(json.dumps(record))
    words = [sys.executable, "-c", SECRETS, str(run), f"--token={CANARY}"]
    subprocess.run(words, check=True, timeout=60)

    kept = records(run)
    (start,) = (record["run"] for record in kept if record["type"] == "run")
    assert start["run_group"] == "grid" and start["job_type"] == "train" and start["notes"] == "a try, token=[redacted]"
    assert start["tags"] == ["x"] and start["config"]["update"]["model"]["layers"]
    artifacts = [record["artifact"] for record in kept if record["type"] == "artifact"]
    assert [a["name"] for a in artifacts if a["type"] == "model"] == [f"checkpoint-{RUN_ID}"] * 2
    assert "latest" in json.dumps(artifacts) and "step-20" in json.dumps(artifacts)
    assert "samples/image-step20" in json.dumps(kept) and "goodput" not in json.dumps(kept)
    samples.joinpath("samples.json").unlink()
    (run / "config.yaml").unlink()  # `open_run` does not write a secret into it
    files = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]


SECRETS = """
import os, sys
from pathlib import Path
from mmtrain.config.compose import load_frozen
from mmtrain.track.tracker import Tracker
run, config = Path(sys.argv[1]), load_frozen(Path(sys.argv[1]) / "config.yaml")
tracker = Tracker(run, config, 1, "abc12345")
tracker.log(1, {"tokens": 1})
tracker.alert("key", sys.argv[2])
tracker.close(0)
"""
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63606060000000040001f61738550000"
    "000049454e44ae426082"
)


@pytest.mark.slow
def test_all_rows_arrive_once_though_the_server_is_away_stalls_and_fails(new_run, monkeypatch, table):
    """Away for the first half, then failing 20 % of its calls, then stalled; then failing during `mmtrain sync`."""
    with Loopback() as reserved:
        port = reserved.port
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    for name, seconds in (("FILE_STREAM_TRANSMIT_INTERVAL", "1"), ("GRAPHQL_RETRY_WAIT_MAX_SECONDS", "2")):
        monkeypatch.setenv(f"WANDB_X_{name}", seconds)  # a short test; they are no settings of ours
    run = new_run("online")
    training = start_training(run, 1, 1_000_000, pace=0.1)
    time.sleep(15)
    away = len(read_metrics(run / "metrics.jsonl"))
    with Loopback(port, failing=0.2) as server:
        server.wait_for_rows(RUN_ID, away + 30)
        server.stalled.set()
        while len(read_metrics(run / "metrics.jsonl")) < 2 * away - 5:
            time.sleep(0.2)
        (run / "enough").touch()
        output, _ = training.communicate(timeout=60)
        steps = [row["step"] for row in read_metrics(run / "metrics.jsonl")]
        assert 100 < away + 30 <= len(server.rows(RUN_ID)) < len(steps), output
        assert "to send the rest: mmtrain sync" in output
        spent, seconds = map(float, re.findall(r"spent (\S+) (\S+)", output)[0])
        assert spent < 0.01 * seconds and away > 0.4 * len(steps), output
        server.stalled.clear()

        assert mmtrain("sync", str(run)).returncode == 0
        assert [row["step"] for row in server.rows(RUN_ID)] == steps
        assert server.run_ids == {RUN_ID} and server.overwritten_differently == 0
    promise = "training waits less than 1 % of its time; `mmtrain sync` then sends what is missing, once and in order"
    table("W&B's server is away, fails 20 % of its calls, stalls", promise, "so")


def test_a_key_that_is_refused_and_folders_that_are_none(new_run, monkeypatch, tmp_path):
    run = new_run("offline")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert "W&B has no key; run `wandb login`" in mmtrain("sync", str(run)).stderr
    with Loopback() as server:
        server.refuses_key = True
        done = mmtrain("sync", str(run), WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
    assert done.returncode == 2 and "refuses the key" in done.stderr and "wandb login --relogin" in done.stderr
    assert KEY not in done.stderr and not (run / "wandb/synced.json").exists()
    done = mmtrain("sync", str(tmp_path / "nowhere"), WANDB_API_KEY=KEY)
    assert done.returncode == 2 and "is no run directory" in done.stderr


IMPATIENT = """
import sys
from mmtrain.track import follow, wandb_run
wandb_run.INIT_SECONDS, follow.RETRY_SECONDS = 3.0, 1.0
sys.exit(follow.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_server_that_comes_later_and_a_key_that_is_mended_get_all_rows(new_run, monkeypatch):
    with Loopback() as reserved:
        port = reserved.port
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    run = new_run("online")
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": 2.0}}\n' for step in range(1, 31)))
    words = [sys.executable, "-c", IMPATIENT, str(run), "online", str(os.getpid())]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as follower:
        assert "cannot be reached" in follower.stdout.readline()
        with Loopback(port) as server:
            server.refuses_key = True
            assert "refuses the key" in follower.stdout.readline()
            server.refuses_key = False
            server.wait_for_rows(RUN_ID, 30)
            assert follower.communicate('{"exit_code": 0}\n', timeout=60)[0].startswith("W&B: http")
            assert follower.returncode == 0 and server.finished == [0]


OFFLINE = """
import atexit, sys
from pathlib import Path
from mmtrain.track.wandb_run import WandbRun
calls = []
watched = {"socket.getaddrinfo": 0, "socket.gethostbyname": 0, "socket.connect": 1}
sys.addaudithook(lambda event, args: calls.append(str(args[watched[event]])) if event in watched else None)
atexit.register(lambda: print([call for call in calls if "/" not in call and "127.0.0.1" not in call]))
run = WandbRun(Path(sys.argv[1]), "offline", Path(sys.argv[1]), 10.0)
run.send_rows()
run.finish(0)
"""


def test_offline_asks_no_server(new_run, monkeypatch):
    for name in ("WANDB_BASE_URL", "WANDB_ERROR_REPORTING"):
        monkeypatch.delenv(name, raising=False)
    run = new_run("offline")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    command = [sys.executable, "-c", OFFLINE, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_online_without_a_key_stays_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(WandbSink, "_start", lambda *_: None)
    said = []
    assert WandbSink(tmp_path, TrackConfig(wandb="online"), RUN_ID, said.append).mode == "offline"
    assert len(said) == 1 and "WANDB_API_KEY" in said[0]


def test_disabled_writes_nothing(new_run):
    run = new_run("disabled")
    before = sorted(run.iterdir())
    start_training(run, 1, 2).wait(60)
    assert sorted(run.iterdir()) == sorted([*before, run / "metrics.jsonl"])


def test_auto_goes_online_only_with_a_login(monkeypatch, tmp_path):
    assert resolve_mode("auto") == "offline"
    monkeypatch.delenv("WANDB_BASE_URL")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40 + "\n")
    (tmp_path / "netrc").chmod(0o600)
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "disabled" and resolve_mode("offline") == "offline"

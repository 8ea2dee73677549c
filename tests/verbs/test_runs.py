"""`mmtrain runs`: states that are true, a page that shows what differs, files of strangers that break nothing."""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import cache

import pytest

from mmtrain import cli
from mmtrain.config.compose import compose, freeze
from mmtrain.track import MetricsWriter, end_segment, start_segment
from mmtrain.track.metrics import last_rows
from mmtrain.train.status import write_status
from mmtrain.train.supervise import record
from mmtrain.verbs import run_state, sweep, sweep_job
from mmtrain.verbs.run_state import list_runs, read_run

HOSTILE = '</script><img src=x onerror=alert(1)>\x1b[31m\u202e" key=hf_' + "a1B2" * 8
CODE = "import sys; from mmtrain import cli; cli.main(sys.argv[1:]); assert 'torch' not in sys.modules"


def rows(steps, loss=6.0, ago=0.0, every=1.0):
    """Rows of so many steps, a second apart, the last one `ago` seconds old; validation at every fifth."""
    now = time.time() - ago
    for step in range(1, steps + 1):
        row = {"step": step, "tokens": 100 * step, "loss": loss - step / 100, "loss_text": loss, "loss_image": loss - 1}
        row |= {"mfu_causal": 0.25, "flops_total": 10**9 * step, "step_seconds": every}
        row |= {"val_loss": loss - step / 50, "val_loss_text": loss, "lr": 1e-3} if step % 5 == 0 else {}
        yield row | {"time": now - every * (steps - step)}


@cache
def composed(*words):
    return compose(["experiment=smoke", "train.steps=20", *words])


def make(folder, words=(), steps=10, state="finished", host=None, minded=False, **shown):
    """A run directory as training leaves it, with 10 of 20 steps logged."""
    folder.mkdir(parents=True)
    freeze(composed(*words), folder / "config.yaml")
    (folder / "environment.json").write_text(json.dumps({"command": "mmtrain train experiment=smoke train.steps=20"}))
    if minded:
        record(folder, "start", {}, 1)
    if state:
        start_segment(folder, 0, 1)
    if host:
        line = json.loads((folder / "segments.jsonl").read_text())
        (folder / "segments.jsonl").write_text(json.dumps(line | {"host": host}) + "\n")
    writer = MetricsWriter(folder / "metrics.jsonl")
    for row in rows(steps, **shown):
        writer.write(row)
    writer.close()
    if state:
        write_status(folder, state, steps, "SIGTERM" if state == "stopped" else "")
        status = json.loads((folder / "status.json").read_text())
        (folder / "status.json").write_text(
            json.dumps(status | {"time": time.time() - shown.get("ago", 0) - steps - 100})
        )
        if state != "running":
            end_segment(folder, steps, state)
    checkpoint = folder / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    manifest = {"files": {"state.json": {"bytes": 2_000_000}}, "time": time.time(), "permanent": True}
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))
    (checkpoint.parent / "step-00000015").mkdir()  # not complete
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def main(*words):
    return cli.main(["runs", *words])


def test_a_run_is_what_its_files_and_its_processes_say(root):
    for state in ("finished", "stopped", "failed"):
        make(root / state, state=state)
    make(root / "killed", state="running")  # its status says running, and nobody holds its lock
    make(root / "elsewhere", state="running", host="another-host")
    make(root / "silent-elsewhere", state="running", host="another-host", ago=3600)
    make(root / "prepared", state=None, steps=0)
    make(root / "between-starts", state="running", minded=True)
    assert {run.name: run.state for run in list_runs(root)} == {
        "finished": "finished", "stopped": "stopped", "failed": "failed", "killed": "failed", "elsewhere": "running",
        "silent-elsewhere": "stalled", "prepared": "waiting", "between-starts": "running",
    }  # fmt: skip
    assert read_run(root / "stopped").reason == "SIGTERM" and "killed" in read_run(root / "killed").reason
    run = read_run(root / "finished")
    assert (run.step, run.steps, run.checkpoint_step) == (10, 20, 10)
    assert run.numbers["val_loss"] == pytest.approx(5.8) and run.numbers["tokens"] == 1000


@pytest.mark.parametrize(("lock", "ago", "state"), [(sweep_job.WORKERS_CLAIM, 0, "running"),
                                                    (sweep_job.WORKERS_CLAIM, 600, "stalled"),
                                                    (sweep_job.CLAIM, 0, "running")])  # fmt: skip
def test_who_holds_the_lock_trains_and_is_late_by_its_own_measure(root, lock, ago, state):
    assert lock in run_state.LOCKS
    folder = make(root / "run", state="running", ago=ago, steps=5000)  # more than what is read of them
    with open(folder / lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert read_run(folder).state == state
        (folder / "metrics.jsonl").unlink()  # a run whose steps take ten minutes is not late after ten minutes
        for row in rows(3, ago=ago, every=600.0):
            MetricsWriter(folder / "metrics.jsonl").write(row)
        assert read_run(folder).state == "running"
    assert read_run(folder).state == "failed"


def test_what_is_cut_old_or_foreign_is_read_as_far_as_it_goes(root, capsys):
    cut = make(root / "cut")
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "loss": 1.')
    assert read_run(cut).step == 10
    old = make(root / "old")
    (old / "config.yaml").write_text("name: old\ntrain:\n  steps: 20\nretired: {key: 1}\n")
    for name in ("status.json", "environment.json", "segments.jsonl"):
        (old / name).unlink()
    foreign = make(root / "foreign")
    (foreign / "metrics.jsonl").write_text(
        '[]\n{"step": "x"}\n{"step": 3, "tokens": "many", "time": null}\nnull\n\xff\n'
    )
    (foreign / "status.json").write_text('{"state": [], "step": 1, "reason": 2, "time": "now"}')
    (foreign / "attempts.jsonl").write_text(
        json.dumps({"event": "start", "time": "x", "pid": "y", "host": socket.gethostname()})
    )
    (foreign / "ledger.json").write_text('{"flops": 3}')
    (foreign / "checkpoints" / "step-00000010" / "MANIFEST.json").write_text("{}")
    (foreign / "segments.jsonl").write_text('{"event": "start"}\n')
    (root / "damaged").mkdir()
    (root / "damaged" / "sweep.json").write_text("{")
    states = {run.name: run.state for run in list_runs(root)}
    assert states == {"cut": "finished", "old": "unknown", "foreign": "failed"}
    for name in states:
        assert main("show", name) == 0, name
    output = capsys.readouterr().out
    assert "retired.key" in output and "no such key" in output and "cannot be read" in output


def test_nan_is_shown_and_the_last_validation_is_found_far_back(root, capsys):
    folder = make(root / "long")
    writer = MetricsWriter(folder / "metrics.jsonl")
    for step in range(11, 2000):
        writer.write({"step": step, "loss": float("nan"), "padding": "x" * 50})
    writer.close()
    assert len(last_rows(folder / "metrics.jsonl", "val_loss")) < 1500
    assert main("ls") == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert " nan " in line and " 5.8000 " in line and "1999/20" in line
    assert main("ls", "--json") == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["loss"] is None


def test_jobs_of_a_sweep_are_listed_before_they_start(root, capsys):
    assert run_state.SWEEP == sweep.SWEEP
    make(root / "grid" / "lr=1")
    states = [("lr=1", "finished", ""), ("lr=2", "failed", "no such file"), ("lr=3", "waiting", ""), ("../out", "", "")]
    jobs = [{"name": name, "state": state, "reason": reason} for name, state, reason in states]
    (root / "grid" / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    assert main("ls", "grid/*") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["grid/lr=1", "finished"], ["grid/lr=2", "failed"], ["grid/lr=3", "waiting"]]  # fmt: skip
    assert lines[4] == "grid/lr=2 failed: no such file" and len(lines) == 5
    assert main("show", "lr=1") == 0


@pytest.mark.parametrize(("words", "said"), [
    (["ls", "root=nowhere"], "root=nowhere is no folder"),
    (["show", "quikstart"], "did you mean quickstart?"),
    (["watch", "empty"], "is no run directory"),
    (["show"], "nothing was trained under runs yet"),
    (["compare", "quickstart"], "there are 1 runs to compare"),
    (["list"], "there is ls, show, compare, watch"),
    (["ls", "out=page.html"], "takes root=, not out"),
    (["watch", "quickstart", "every=no"], "must be seconds"),
])  # fmt: skip
def test_mistakes_are_a_sentence(root, words, said, capsys):
    make(root / "quickstart")
    (root / "empty").mkdir()
    assert main(*words) == 2
    assert said in capsys.readouterr().err


def test_an_empty_root_is_no_mistake(root, capsys):
    root.mkdir()
    assert main("ls") == 0
    assert "no run under runs yet" in capsys.readouterr().out


def test_a_thousand_runs_are_listed_within_a_second_or_two_without_torch(root):
    first = make(root / "run-0000", steps=2000)
    for number in range(1, 1000):
        folder = root / f"run-{number:04d}"
        folder.mkdir()
        for name in ("config.yaml", "metrics.jsonl", "status.json"):
            os.link(first / name, folder / name)
    command = [sys.executable, "-c", CODE, "runs", "ls"]
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1001, done.stderr
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < 6.0  # measured: 2.4


def test_show_says_what_is_not_as_in_the_experiment_and_where_everything_is(root, capsys):
    folder = make(root / "run", ["optim.lr=0.5"])
    (folder / "ledger.json").write_text(json.dumps({"flops": {"train_text": 75, "evaluation": 25, "sampling": 0},
                                                    "training_total": 75, "spent_total": 100}))  # fmt: skip
    (folder / "run_id").write_text("abc123")
    segment = folder / "wandb" / "offline-run-20260101_000000-abc123"
    segment.mkdir(parents=True)
    (segment / "run-abc123.wandb").touch()
    assert main("show", "run", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["settings"]["from"] == "experiment=smoke" and facts["settings"]["changed"]["optim.lr"][1] == "0.5"
    assert set(facts["settings"]["changed"]) == {"optim.lr", "train.steps"}
    assert facts["checkpoints"]["step-00000010"]["bytes"] == 2_000_000
    assert main("show", "run") == 0
    output = capsys.readouterr().out
    expected = [
        "experiment=smoke",
        "train_text 7.50e1 75.0%",
        "image 5.0000",
        "2.0 MB",
        "kept for good",
        "goodput",
        "incomplete",
    ]
    expected += ["abc123: not uploaded", "25.0% MFU (model FLOPs, causal)"]
    for said in expected:
        assert re.search(said.replace(" ", r"\s+").replace("(", r"\(").replace(")", r"\)"), output), said


def test_the_page_has_the_differing_settings_first_and_all_texts_escaped(root, capsys):
    make(root / "grid" / "lr=1")
    make(root / "grid" / 'b"<b>', ["optim.lr=0.5"], loss=5.0, state="running")
    make(root / "grid" / "empty", steps=0)
    config = root / "grid" / "lr=1" / "config.yaml"
    config.write_text(config.read_text().replace("notes: ''", f"notes: {json.dumps(HOSTILE)}"))
    assert main("compare", "grid") == 0
    source = (root / "grid" / "compare.html").read_text()
    places = [
        source.index(part) for part in ("Settings that differ", "notes", "optim.lr", "Where they stand", "Curves")
    ]
    assert places == sorted(places)
    assert "<img src=x" not in source and "<b>&" not in source and "a1B2" not in source and "\u202e" not in source
    assert "&lt;img src=x onerror=alert(1)&gt;" in source and "b&quot;&lt;b&gt;" in source
    assert source.count("data:image/png") == 2 * 5 and "http" not in source.replace("http-equiv", "")
    assert "<b>4.8000</b>" in source and "Without numbers, and so not here: empty" in source
    assert "With care" not in source  # what is learned from is the same
    assert "compare.html" in capsys.readouterr().out


def test_watching_ends_with_the_run_and_says_how(root, capsys, monkeypatch):
    folder = make(root / "run", state="running")

    def go_on():
        time.sleep(0.5)
        writer = MetricsWriter(folder / "metrics.jsonl")
        writer.write({"step": 11, "loss": 1.25})
        time.sleep(0.5)
        writer.write({"step": 12, "loss": 1.125})
        write_status(folder, "failed", 12, "exit code 1")
        fcntl.flock(lock, fcntl.LOCK_UN)

    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=go_on)
        other.start()
        assert main("watch", "run", "every=0.1") == 1
        other.join()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 6/20") and lines[-1] == "run failed at step 12 of 20: exit code 1"
    assert [line.split()[1] for line in lines if line.startswith("step")] == [f"{n}/20" for n in range(6, 13)]

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    assert main("watch", "run") == 1
    panel = capsys.readouterr().out
    assert "1.1250" in panel and "validation" in panel and "step 10" in panel, panel


def test_ctrl_c_ends_the_watching_alone(root):
    folder = make(root / "run", state="running")
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        watching = subprocess.Popen(
            [sys.executable, "-m", "mmtrain", "runs", "watch", "run"], stdout=subprocess.PIPE, text=True
        )
        assert watching.stdout
        while not watching.stdout.readline().startswith("step 10/20"):
            assert watching.poll() is None
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == 130 and "is left alone" in watching.stdout.read()
        assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

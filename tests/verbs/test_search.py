"""A search prunes, is worked on by several, survives kill -9, and refuses what is not its own.

The trials here are a script that behaves as `mmtrain train` does; tests/e2e/test_search.py has the real one.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mmtrain import cli
from mmtrain.config.compose import compose, freeze
from mmtrain.verbs import sweep_job

# Trains ten "steps", each a validation and a line of RUN/trained; the loss at the end is |log10(lr) + 2| + depth / 10.
# lr above 0.3 fails. SIGTERM stops it after a step, and the next start goes on.
TRAINER = """
import json, math, pathlib, shutil, signal, sys, time
words = dict(word.split("=", 1) for word in sys.argv[2:])
run = pathlib.Path(words["root"], words["name"])
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
shutil.copy(pathlib.Path(__file__).with_name("frozen.yaml"), run / "config.yaml")
trained = run / "trained"
step = len(trained.read_text().split()) if trained.exists() else 0
lr = float(words["optim.lr"])
if lr > 0.3:
    print("mmtrain: lr is planted", file=sys.stderr); sys.exit(1)
while step < 10 and not asked:
    time.sleep(0.2); step += 1
    with open(trained, "a") as file: file.write(f"{step}\\n")
    loss = abs(math.log10(lr) + 2) + int(words["model.layers"]) / 10 + 10 - step
    with open(run / "metrics.jsonl", "a") as file: file.write(json.dumps(dict(step=step, val_loss=loss)) + "\\n")
books = {kind: 0 for kind in BOOKS} | dict(train_text=1000 * step, evaluation=10 * step)
(run / "ledger.json").write_text(json.dumps(dict(format_version=1, flops=books)))
state = "finished" if step == 10 else "stopped"
(run / "status.json").write_text(json.dumps(dict(state=state, step=step, reason="", time=0)))
"""
SPACE = """# @package _global_
defaults: [smoke, _self_]
name: some
engine: {ranks: 1}
train: {steps: 10, evaluate_every: 1}
optim: {warmup_steps: 1}
sweep:
  trials: 6
  sampler: random
  space:
    optim.lr: {low: 1.0e-4, high: 1.0e-1, log: true}
    model.layers: [1, 2]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from mmtrain.flops import BOOKS

    (tmp_path / "trainer.py").write_text(TRAINER.replace("BOOKS", repr(BOOKS)))
    (tmp_path / "my_conf" / "experiment").mkdir(parents=True)
    (tmp_path / "my_conf" / "experiment" / "some.yaml").write_text(SPACE)
    freeze(compose(["experiment=smoke", "train.steps=10", "optim.warmup_steps=1"]), tmp_path / "frozen.yaml")
    monkeypatch.setenv("MMTRAIN_CONFIG_DIR", str(tmp_path / "my_conf"))
    monkeypatch.setattr(sweep_job, "PROGRAM", (sys.executable, str(tmp_path / "trainer.py")))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "some"


def worker(*words: str) -> "subprocess.Popen[str]":
    """A second process that works on the search."""
    code = (
        "import sys; from mmtrain import cli; from mmtrain.verbs import sweep_job; "
        f"sweep_job.PROGRAM = {sweep_job.PROGRAM!r}; sys.exit(cli.main({['sweep', 'experiment=some', *words]!r}))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "search.json").read_text())


def test_two_workers_that_are_killed_leave_a_search_that_goes_on_and_runs_nothing_twice(folder: Path) -> None:
    killed, stopped = worker(), worker()
    while len(list(folder.glob("trial-*/trained"))) < 3:
        assert killed.poll() is None and stopped.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    stopped.send_signal(signal.SIGTERM)
    assert "stopped" in stopped.communicate(timeout=60)[0] and stopped.returncode == 0
    killed.communicate(timeout=60)
    assert cli.main(["sweep", "experiment=some", "sweep.parallel=2"]) == 0
    found = record(folder)
    trials = found["trials"]
    assert [trial["name"] for trial in trials] == [f"trial-{i:04d}" for i in range(6)]
    assert {trial["state"] for trial in trials} == {"complete", "pruned"}
    for trial in trials:
        steps = [int(line) for line in (folder / trial["name"] / "trained").read_text().split()]
        assert steps == list(range(1, len(steps) + 1))  # none was trained twice, also over two starts
        assert len(steps) == 10 if trial["state"] == "complete" else 1 <= len(steps) < 10
        assert trial["flops"]["training"] == 1000 * len(steps) and trial["flops"]["without_pruning"] == 10_000
    assert found["flops"]["training"] == sum(trial["flops"]["training"] for trial in trials)
    spent = found["flops"]
    assert spent["without_pruning"] == 60_000 and spent["saved"] == round(1 - spent["training"] / 60_000, 4) > 0
    best = min((trial for trial in trials if trial["state"] == "complete"), key=lambda trial: trial["metric"])
    assert found["best"] == best["name"]
    config = compose(["experiment=best"], folder)
    assert config.optim.lr == best["settings"]["optim.lr"] and config.train.steps == 10


def test_what_is_drawn_depends_on_the_seed_alone(folder: Path) -> None:
    for name in "ab":
        assert cli.main(["sweep", "experiment=some", "sweep.trials=2", "sweep.pruner=hyperband", f"name={name}"]) == 0
    first, second = ([t["settings"] for t in record(folder.with_name(name))["trials"]] for name in "ab")
    assert first == second and first[0] != first[1]


def test_a_grid_has_every_point_once_and_failures_are_named(folder: Path, capsys: pytest.CaptureFixture) -> None:
    file = folder.parents[1] / "my_conf" / "experiment" / "some.yaml"
    file.write_text(file.read_text().replace("{low: 1.0e-4, high: 1.0e-1, log: true}", "[0.01, 0.5]"))
    assert cli.main(["sweep", "experiment=some", "sweep.sampler=grid", "sweep.trials=1"]) == 1
    trials = record(folder)["trials"]
    assert [(t["settings"]["optim.lr"], t["settings"]["model.layers"], t["state"]) for t in trials] == [
        ("0.01", "1", "complete"),
        ("0.01", "2", trials[1]["state"]),
        ("0.5", "1", "fail"),
        ("0.5", "2", "fail"),
    ]
    assert "lr is planted (runs/some/trial-0002/logs/sweep.log)" in capsys.readouterr().out


def test_a_folder_of_something_else_is_refused(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["sweep", "experiment=some", "sweep.trials=1"]) == 0
    assert cli.main(["sweep", "experiment=some", "data_dir=elsewhere"]) == 2
    assert "holds another search (settings was" in capsys.readouterr().err
    assert cli.main(["train", "experiment=smoke", "name=some"]) == 2
    assert "choose another name=" in capsys.readouterr().err
    assert cli.main(["train", "-m", "experiment=smoke", "seed=1,2", "name=some"]) == 2
    assert "is the folder of a search, not of a grid" in capsys.readouterr().err
    (folder / "study.db").unlink()
    assert cli.main(["sweep", "experiment=some"]) == 2
    assert "whose study is gone" in capsys.readouterr().err
    for file, what in (("config.yaml", "directory of one run"), ("sweep.json", "folder of a grid")):
        other = folder.with_name(what.replace(" ", "_"))
        other.mkdir()
        (other / file).write_text("{}")
        assert cli.main(["sweep", "experiment=some", f"name={other.name}"]) == 2
        assert what in capsys.readouterr().err


def test_a_storage_that_does_not_answer_is_one_sentence(folder: Path, capsys: pytest.CaptureFixture) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        port = closed.getsockname()[1]
        storages = {
            f"postgresql://me:secret@127.0.0.1:{port}/name": "does not answer ([Errno 111] Connection refused)",
            "sqlite:////nowhere/study.db": "does not answer (unable to open database file)",
            "sqlite:///my_conf/experiment/some.yaml": "does not answer (file is not a database)",
            "nothing": "does not answer (Could not parse",
        }
        for url, sentence in storages.items():
            assert cli.main(["sweep", "experiment=some", f"sweep.storage={url}"]) == 2
            error = capsys.readouterr().err
            assert sentence in error and "secret" not in error and error.count("\n") == 1, error
    assert not list(folder.glob("trial-*"))

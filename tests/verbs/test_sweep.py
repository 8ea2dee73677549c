"""A sweep starts its jobs, names what failed, stops all, and runs again only what is missing.

The jobs here are a script that behaves as `mmtrain train` does; tests/e2e/test_sweep.py has the real one.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mmtrain import cli
from mmtrain.config import UserError
from mmtrain.config import sweep as sweep_of_words
from mmtrain.verbs import sweep, sweep_job

# Trains two "steps" of 0.3 s; seed 1 fails, SIGTERM stops it after a step; every start is noted in RUN/starts.
TRAINER = """
import json, pathlib, signal, sys, time
words = dict(word.split("=", 1) for word in sys.argv[2:])
if sys.argv[1] == "evaluate":
    pathlib.Path(words["run"], "evaluated").write_text(str(words)); sys.exit()
run = pathlib.Path(words["root"], words["name"])
with open(run / "starts", "a") as file: file.write("x")
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
def status(state, step): (run / "status.json").write_text(json.dumps(dict(state=state, step=step, reason="", time=0)))
done = run / "steps"
step = int(done.read_text()) if done.exists() else 0
while step < 2 and not asked:
    time.sleep(0.3); step += 1; done.write_text(str(step))
    if words["seed"] == "1":
        print("mmtrain: seed 1 is planted", file=sys.stderr)
        print("mmtrain: training ended (what happened is printed above)", file=sys.stderr); sys.exit(1)
status("finished" if step == 2 else "stopped", step)
"""
WORDS = ["train", "-m", "experiment=smoke", "engine.ranks=1", "seed=1,2", "name=some"]
expand = cache(lambda words: sweep_of_words.expand(list(words)))  # half a second for each job


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    monkeypatch.setattr(sweep_job, "PROGRAM", (sys.executable, str(script)))
    monkeypatch.setattr(sweep, "expand", lambda words: expand(tuple(words)))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "some"


def states(folder: Path) -> dict[str, str]:
    return {job["name"]: job["state"] for job in jobs(folder)}


def jobs(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "sweep.json").read_text())["jobs"]


def starts(folder: Path) -> dict[str, int]:
    return {path.parent.name: len(path.read_text()) for path in sorted(folder.glob("*/starts"))}


def test_a_failed_job_is_named_and_stops_no_other_and_only_what_is_missing_runs_again(folder: Path, capsys) -> None:
    assert cli.main(WORDS) == 1
    assert states(folder) == {"seed=1": "failed", "seed=2": "finished"}
    assert jobs(folder)[0]["reason"] == "seed 1 is planted" and jobs(folder)[0]["exit_code"] == 1
    assert "seed 1 is planted (runs/some/seed=1/logs/sweep.log)" in capsys.readouterr().out
    assert cli.main(WORDS) == 1
    assert starts(folder) == {"seed=1": 1, "seed=2": 1}
    assert cli.main([*WORDS, "sweep.retry_failed=true"]) == 1
    assert starts(folder) == {"seed=1": 2, "seed=2": 1}


def test_a_trained_run_is_evaluated(folder: Path) -> None:
    assert cli.main([*WORDS[:-2], "seed=2,3", "name=some", "sweep.evaluate=[shapes,loss]"]) == 0
    # The section task of smoke is that of loss: it counts as it is.
    log = (folder / "seed=3/logs/sweep.log").read_text().splitlines()
    assert log[1:] == [
        "$ mmtrain evaluate run=runs/some/seed=3 task=shapes",
        "$ mmtrain evaluate run=runs/some/seed=3",
    ]


def test_another_sweep_in_the_folder_and_two_at_once_are_refused(folder: Path, capsys) -> None:
    assert cli.main(WORDS) == 1
    assert cli.main([*WORDS[:-2], "seed=1", "optim.lr=1e-3,2e-3", "name=some"]) == 2
    assert "holds another sweep (it has no lr=0.001" in capsys.readouterr().err
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert cli.main(WORDS) == 2
    assert "another process runs the sweep runs/some" in capsys.readouterr().err
    assert cli.main(["train", "experiment=smoke", "name=some"]) == 2
    assert "is the folder of a sweep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["stream.global_batch=4,5", "engine.ranks=2"], "job global_batch=5: stream.global_batch=5 does not divide"),
        (["seed=1,2", "sweep.evaluate=[shape]"], "did you mean shapes?"),
        (["seed=1,2", "engine.master_port=3000", "sweep.parallel=2"], "engine.master_port is for one job at a time"),
    ],
)
def test_what_would_fail_later_is_refused_before_anything_starts(words, sentence, folder: Path, capsys) -> None:
    assert cli.main(["train", "-m", "experiment=smoke", "name=some", *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_when_the_sweep_is_ended_its_jobs_save_and_the_same_command_goes_on(number, folder: Path) -> None:
    code = (
        "import sys; from mmtrain import cli; from mmtrain.verbs import sweep_job; "
        f"sweep_job.PROGRAM = {sweep_job.PROGRAM!r}; sys.exit(cli.main({[*WORDS, 'sweep.parallel=2']!r}))"
    )
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root}, stdout=subprocess.PIPE, text=True
    )
    while not (folder / "seed=2/starts").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (0 if number == signal.SIGTERM else -number)
    if number == signal.SIGTERM:
        assert "the same command goes on with those that wait" in output
        assert states(folder)["seed=2"] == "waiting"
    assert cli.main(WORDS) == 1
    assert states(folder) == {"seed=1": "failed", "seed=2": "finished"}
    assert (folder / "seed=2/steps").read_text() == "2" and starts(folder)["seed=2"] == 2


def test_jobs_share_out_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    def places(gpus: int, ranks: int, parallel: int, number: int = 9) -> list[str | None]:
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        job = SimpleNamespace(config=SimpleNamespace(engine=SimpleNamespace(ranks=ranks)))
        return [place.get("CUDA_VISIBLE_DEVICES") for place in sweep.places_of((job,) * number, parallel)]  # type: ignore[arg-type]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert places(8, 0, 1) == [None]
    assert places(8, 0, 2) == ["0,1,2,3", "4,5,6,7"]
    assert places(4, 0, 0) == ["0", "1", "2", "3"]
    assert places(4, 2, 0) == ["0,1", "2,3"]
    assert places(2, 1, 3) == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert places(2, 0, 0) == ["5", "7"]


def test_one_job_of_a_grid_by_its_number(folder: Path) -> None:
    assert sweep.one_job(WORDS[2:]) is None
    chosen = sweep.one_job([*WORDS[2:], "sweep.job=1"])
    assert chosen is not None and chosen.name == "seed=2" and "seed=2" in chosen.overrides
    assert not any(word.startswith("sweep") for word in chosen.overrides)
    with pytest.raises(UserError, match="from 0 to 1"):
        sweep.one_job([*WORDS[2:], "sweep.job=2"])


def test_a_grid_is_not_prepared_as_one_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "prepare", *WORDS[1:]]) == 2 and "sweep.job=NUMBER" in capsys.readouterr().err
    assert cli.main(["train", "experiment=smoke", "sweep.job=0"]) == 2 and "add -m and axes" in capsys.readouterr().err


def test_a_job_of_a_ladder_is_chosen_as_of_any_grid(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=shapes_tiny", "train.flops=1e10,2e10", "sweep.job=99", "name=some"]
    assert cli.main(["sweep", "ladder", *words]) == 2 and "grid of 10 jobs" in capsys.readouterr().err

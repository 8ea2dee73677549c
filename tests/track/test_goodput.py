"""The account of a run's time: what counts, what was lost, and to what."""

import json
from pathlib import Path

import pytest

from mmtrain.track import goodput
from mmtrain.track.goodput import UNKNOWN


def write(path: Path, *lines: dict) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def row(time: float, step: int, seconds: float) -> dict:
    return {"time": time, "step": step, "step_seconds": seconds, "seconds/data": 1.0}


def test_a_run_that_never_started_has_none(tmp_path: Path) -> None:
    assert goodput(tmp_path) is None


def test_a_straight_run(tmp_path: Path) -> None:
    write(tmp_path / "segments.jsonl", {"event": "start", "time": 100, "step": 0, "ranks": 1},
          {"event": "end", "time": 200, "step": 20, "cause": "finished"})  # fmt: skip
    write(tmp_path / "metrics.jsonl", row(150, 10, 4.0), row(195, 20, 4.5))
    account = goodput(tmp_path)
    assert account is not None and account.ratio == pytest.approx(0.85)
    assert (account.interruptions, account.lost_steps, account.sections) == ([], 0, {"data": 2.0})


def test_a_killed_run_counts_lost_steps_and_down_time(tmp_path: Path) -> None:
    """Killed after logging step 20, started again 50 s later from the checkpoint of step 10."""
    write(tmp_path / "segments.jsonl", {"event": "start", "time": 100, "step": 0, "ranks": 1},
          {"event": "start", "time": 250, "step": 10, "ranks": 1},
          {"event": "end", "time": 350, "step": 30, "cause": "finished"})  # fmt: skip
    rows = [row(150, 10, 5.0), row(200, 20, 5.0), row(300, 20, 5.0), row(350, 30, 5.0)]
    write(tmp_path / "metrics.jsonl", *rows)
    account = goodput(tmp_path)
    assert account is not None
    assert (account.wall_seconds, account.productive_seconds) == (250, 150)
    (lost,) = account.interruptions
    assert (lost.cause, lost.step, lost.lost_steps, lost.down_seconds) == (UNKNOWN, 20, 10, 50)
    write(tmp_path / "attempts.jsonl", {"event": "end", "time": 205, "cause": "killed (SIGKILL)"})
    account = goodput(tmp_path)
    assert account is not None and account.interruptions[0].cause == "killed (SIGKILL)"


def test_the_time_after_a_deliberate_stop_is_not_lost(tmp_path: Path) -> None:
    write(tmp_path / "segments.jsonl", {"event": "start", "time": 0, "step": 0, "ranks": 1},
          {"event": "end", "time": 100, "step": 10, "cause": "SIGTERM"},
          {"event": "start", "time": 9000, "step": 10, "ranks": 1},
          {"event": "end", "time": 9100, "step": 20, "cause": "finished"})  # fmt: skip
    write(tmp_path / "metrics.jsonl", row(99, 10, 8.0), row(9090, 20, 8.0))
    account = goodput(tmp_path)
    assert account is not None and account.ratio == pytest.approx(0.8)
    assert account.interruptions[0].lost_steps == 0 and account.interruptions[0].down_seconds == 8900


def test_a_line_that_a_crash_cut_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "segments.jsonl", {"event": "start", "time": 0, "step": 0, "ranks": 1})
    with open(tmp_path / "segments.jsonl", "a") as file:
        file.write('{"event": "en')
    write(tmp_path / "metrics.jsonl", row(10, 2, 4.0))
    account = goodput(tmp_path)
    assert account is not None and account.ratio == pytest.approx(0.8)

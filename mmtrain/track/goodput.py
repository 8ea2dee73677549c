"""How much of the time since the first start went into steps that count, and what became of the rest.

RUN/segments.jsonl has one line for every start of training and one for every end that the process lived to write; how
the others ended is in RUN/attempts.jsonl, if a supervisor saw it. The steps come from metrics.jsonl.
"""

import json
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtrain.track.metrics import read_metrics

SEGMENTS, ATTEMPTS = "segments.jsonl", "attempts.jsonl"
DELIBERATE = ("SIGTERM", "SIGUSR1", "finished", "stopped")  # the time until the next start is nobody's loss
UNKNOWN = "killed or lost"


@dataclass(frozen=True)
class Interruption:
    """An end of training before the last step. lost_steps: logged steps that were done again afterwards."""

    cause: str
    step: int
    lost_steps: int
    down_seconds: float


@dataclass(frozen=True)
class Goodput:
    """Seconds by what they went into; `sections` split up the productive and other time of the surviving steps."""

    wall_seconds: float
    productive_seconds: float
    interruptions: list[Interruption] = field(default_factory=list)
    sections: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Effective training time ratio: time of the steps that count over time since the first start."""
        return self.productive_seconds / self.wall_seconds if self.wall_seconds > 0 else None

    @property
    def lost_steps(self) -> int:
        """Logged steps that were done twice."""
        return sum(interruption.lost_steps for interruption in self.interruptions)


def start_segment(run_dir: Path, step: int, ranks: int) -> None:
    """Note that training goes on after `step`."""
    _append(run_dir, {"event": "start", "step": step, "ranks": ranks, "host": socket.gethostname()})


def end_segment(run_dir: Path, step: int, cause: str) -> None:
    """Note that training ended after `step`; cause: finished, a signal, or what went wrong."""
    _append(run_dir, {"event": "end", "step": step, "cause": cause})


def goodput(run_dir: Path) -> Goodput | None:
    """The account of a run; None when it never started."""
    events = _read(run_dir / SEGMENTS)
    starts = [event for event in events if event["event"] == "start"]
    if not starts:
        return None
    rows = read_metrics(run_dir / "metrics.jsonl")
    logged = _read(run_dir / "metrics.jsonl")
    attempts = [event for event in _read(run_dir / ATTEMPTS) if event.get("event") == "end"]
    wall, interruptions = 0.0, []
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        until = following["time"] if following else float("inf")
        ends = [e for e in events if e["event"] == "end" and start["time"] <= e["time"] <= until]
        seen = [row for row in logged if start["time"] <= row.get("time", 0.0) <= until]
        last = max([start["time"], *(event["time"] for event in [*ends, *seen])])
        wall += last - start["time"]
        if following is None:
            break
        causes = [e["cause"] for e in [*ends, *attempts] if start["time"] <= e["time"] <= until and e.get("cause")]
        cause = causes[0] if causes else UNKNOWN
        down = following["time"] - last
        reached = max([start["step"], *(row["step"] for row in seen)])
        interruptions.append(Interruption(cause, reached, max(0, reached - following["step"]), down))
        if cause not in DELIBERATE:
            wall += down
    productive, before = 0.0, 0
    sections: dict[str, float] = {}
    for row in rows:
        productive += (row.get("step_seconds") or 0.0) * (row["step"] - before)
        before = row["step"]
        for key, seconds in row.items():
            if key.startswith("seconds/") and seconds:
                name = key.removeprefix("seconds/")
                sections[name] = sections.get(name, 0.0) + seconds
    return Goodput(wall, productive, interruptions, sections)


def _append(run_dir: Path, event: dict[str, Any]) -> None:
    with open(run_dir / SEGMENTS, "a", encoding="utf-8") as file:
        file.write(json.dumps({**event, "time": round(time.time(), 3)}) + "\n")


def _read(path: Path) -> list[dict[str, Any]]:
    """Whole lines that are JSON objects; a crash can cut the last one."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events

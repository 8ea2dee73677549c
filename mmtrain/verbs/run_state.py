"""How runs are doing, by a few small reads for each: neither torch nor the whole of a metrics.jsonl.

Whether a run goes on is not what its status.json says, which a process that was killed leaves behind, but whether a
process holds its lock or minds it (RUN/attempts.jsonl). Where that is another host, the age of its last row decides.
"""

import contextlib
import json
import math
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtrain.config import UserError
from mmtrain.config.suggest import did_you_mean, nearest
from mmtrain.track.metrics import Row, last_rows
from mmtrain.train.status import Status, read_status

WAITING, RUNNING, STALLED = "waiting", "running", "stalled"
FINISHED, STOPPED, FAILED, UNKNOWN = "finished", "stopped", "failed", "unknown"
GOING_ON = (RUNNING, STALLED)

CONFIG, METRICS, SWEEP, LAST = "config.yaml", "metrics.jsonl", "sweep.json", "last"
LOCKS = (".lock", ".sweep.lock")  # of the worker of rank 0, and of the job of a sweep
CHECKPOINT = re.compile(r"step-(\d{8,})")
STEPS = re.compile(rb"^train:\n(?:  .*\n)*?  steps: (\d+)$", re.MULTILINE)
LAST_LINE_BYTES = 4096
MANY_BYTES = 1 << 20

# A run is stalled when its last row is this many times as old as the longest pause between rows that it had before.
STALL_FACTOR = 5.0
STALL_SECONDS = 60.0  # never sooner
FIRST_ROW_SECONDS = 1800.0  # as health.setup_seconds: until the first row there is nothing to compare with


@dataclass(frozen=True)
class RunState:
    """A run in one line. Times are Unix seconds; what is not known is None, or absent from `numbers`.

    numbers: the last value of each key of metrics.jsonl, NaN where it was not finite.
    """

    name: str
    folder: Path
    state: str
    reason: str = ""
    step: int = 0
    steps: int | None = None
    numbers: Row = field(default_factory=dict)
    row_time: float | None = None
    checkpoint_step: int | None = None
    checkpoint_time: float | None = None

    @property
    def goes_on(self) -> bool:
        """Whether a process works on it, as far as one can see from here."""
        return self.state in GOING_ON


class HeldLocks:
    """Who holds which file lock on this host, as of now. To try a lock would make a run fail that starts just then."""

    def __init__(self) -> None:
        self._pids: dict[int, list[int]] = {}
        self.are_known = True
        try:
            lines = Path("/proc/locks").read_text().splitlines()
        except OSError:
            self.are_known, lines = False, []
        for words in map(str.split, lines):
            if words[1] == "FLOCK":
                self._pids.setdefault(int(words[5].rpartition(":")[2]), []).append(int(words[4]))

    def holds(self, file: Path) -> bool:
        """Whether any process holds the lock of a file."""
        try:
            inode = file.stat().st_ino
        except OSError:
            return False
        return any(_may_have_open(pid, file) for pid in self._pids.get(inode, []))


def _may_have_open(pid: int, file: Path) -> bool:
    """Tells apart files of two disks with the same inode number; True where it cannot be seen."""
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
        return any(os.path.samefile(descriptor, file) for descriptor in descriptors if descriptor.exists())
    except OSError:  # of another user, or gone: a child holds what it has inherited
        return True


def list_runs(root: Path) -> list[RunState]:
    """Every run below `root` by name, jobs of sweeps as SWEEP/JOB. Raises UserError where there is no such folder."""
    if not root.is_dir():
        raise UserError(f"root={root} is no folder; give the folder that holds the runs")
    held = HeldLocks()
    if (root / SWEEP).is_file():
        return list(_jobs(root, "", held))
    found = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if (folder / CONFIG).is_file():
            found.append(read_run(folder, folder.name, held))
        elif (folder / SWEEP).is_file():
            found += _jobs(folder, f"{folder.name}/", held)
    return found


def _jobs(sweep: Path, prefix: str, held: HeldLocks) -> Iterator[RunState]:
    """The jobs of a sweep, those included that have not started."""
    entries: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        jobs = json.loads((sweep / SWEEP).read_text(encoding="utf-8"))["jobs"]
        entries = {name: job for job in jobs if Path(name := str(job["name"])).name == name}
    there = {folder.parent.name for folder in sweep.glob(f"*/{CONFIG}")}
    for name in [*entries, *sorted(there - entries.keys())]:
        folder, entry = sweep / name, entries.get(name, {})
        run = read_run(folder, prefix + name, held)
        if run.state in (WAITING, UNKNOWN) and entry.get("state") == FAILED:
            run = RunState(run.name, folder, FAILED, str(entry.get("reason", "")))
        yield run


def read_run(folder: Path, name: str = "", held: HeldLocks | None = None) -> RunState:
    """The state of the run in `folder`; held: of a moment ago, for many runs at a time."""
    held = held or HeldLocks()
    status = read_status(folder)
    rows = last_rows(folder / METRICS, needed="val_loss")
    merged: Row = {}
    for row in rows:
        merged |= row
        if isinstance(infinite := row.get("non_finite"), dict):
            merged |= dict.fromkeys(infinite, math.nan)
    numbers = {key: value for key, value in merged.items() if isinstance(value, (int, float))}
    step = int(numbers.get("step", 0))
    steps = _configured_steps(folder)
    state, reason = _judge(folder, status, rows, step, steps, held)
    checkpoint, written = _newest_checkpoint(folder / "checkpoints")
    time_of_row = _number(numbers.get("time")) or None
    return RunState(name or folder.name, folder, state, reason, step, steps, numbers, time_of_row, checkpoint, written)


def _judge(
    folder: Path, status: Status | None, rows: list[Row], step: int, steps: int | None, held: HeldLocks
) -> tuple[str, str]:
    """State and reason."""
    if status and status.state == FINISHED:
        return FINISHED, ""
    attempt, segment = _last_line(folder / "attempts.jsonl"), _last_line(folder / "segments.jsonl")
    here = any(held.holds(folder / lock) for lock in LOCKS) or _is_minded(attempt)
    if not here and status and status.state in (STOPPED, FAILED):
        return status.state, status.reason
    began = max(_number(status and status.time), _number(attempt.get("time")) * (attempt.get("event") == "start"))
    is_late = began > 0 and _is_late(folder / METRICS, rows, began)
    if here:
        return (STALLED, _silence(rows)) if is_late and status and status.state == RUNNING else (RUNNING, "")
    if status is None:
        if not rows and not attempt:
            return WAITING, ""
        if rows and steps and step >= steps:
            return FINISHED, ""
        return UNKNOWN, "it has no status.json that can be read"
    if held.are_known and segment.get("host", socket.gethostname()) == socket.gethostname():
        cause = attempt.get("cause") if attempt.get("event") == "end" else None
        return FAILED, str(cause or "its processes were killed")
    return (STALLED, f"{_silence(rows)} from {segment.get('host', 'its host')}") if is_late else (RUNNING, "")


def _is_minded(attempt: dict[str, Any]) -> bool:
    """Whether the `mmtrain train` that wrote this line lives on this host; it may start the run again."""
    if attempt.get("host") != socket.gethostname():
        return False
    import psutil

    try:
        process = psutil.Process(attempt["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= attempt["time"]
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _is_late(file: Path, rows: list[Row], began: float) -> bool:
    """Whether the next row should long be there; rows: the last ones; began: the last start."""
    last = _number(rows[-1].get("time")) if rows else 0.0
    if last < began:
        return time.time() - began > FIRST_ROW_SECONDS
    silence = time.time() - last
    if silence < STALL_SECONDS:
        return False
    # Evaluation and checkpoints pause the rows, too: many of them are asked before a run is called late.
    recent = [row for row in last_rows(file, num_bytes=MANY_BYTES) if _number(row.get("time")) >= began]
    times = [_number(row.get("time")) for row in recent]
    pauses = [later - earlier for earlier, later in zip(times, times[1:], strict=False)] or [last - began]
    if len(recent) > 1:
        pauses.append(_number(recent[-1].get("step_seconds")) * (recent[-1]["step"] - recent[-2]["step"]))
    return silence > STALL_FACTOR * max(pauses)


def _number(value: Any) -> float:
    """`value`, 0 for what is none: the files may be another's."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def _silence(rows: list[Row]) -> str:
    return f"no row since step {rows[-1]['step']}" if rows else "no row yet"


def _last_line(path: Path) -> dict[str, Any]:
    """The last line that is a JSON object; {} where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_LINE_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            if isinstance(found := json.loads(line), dict):
                return found
    return {}


def _configured_steps(folder: Path) -> int | None:
    """train.steps, as `freeze` writes it; YAML would take most of the time of a listing."""
    try:
        found = STEPS.search((folder / CONFIG).read_bytes())
    except OSError:
        return None
    return int(found[1]) if found else None


def _newest_checkpoint(folder: Path) -> tuple[int | None, float | None]:
    """Step of the newest complete checkpoint, and when it was written."""
    try:
        matches = filter(None, map(CHECKPOINT.fullmatch, os.listdir(folder)))
        names = sorted((int(match[1]), match[0]) for match in matches)
    except OSError:
        return None, None
    for step, name in reversed(names):
        with contextlib.suppress(OSError):
            return step, (folder / name / "MANIFEST.json").stat().st_mtime
    return None, None


def find_run(word: str | None, root: Path) -> Path:
    """The folder of a run: its path, its name below `root`, or the name of a job in one sweep; None: the last trained.

    Raises UserError with what may have been meant.
    """
    if word is None:
        if not (root / LAST).is_file():
            raise UserError(f"nothing was trained under {root} yet; name a run, or give root=DIR")
        word = (root / LAST).read_text(encoding="utf-8").strip()
    for folder in (Path(word), root / word):
        if (folder / CONFIG).is_file():
            return folder
    jobs = [path.parent for path in root.glob(f"*/*/{CONFIG}") if path.parent.name == word]
    if len(jobs) == 1:
        return jobs[0]
    if len(jobs) > 1:
        raise UserError(f"{word} is a job of {len(jobs)} sweeps; say which: {jobs[0]}, {jobs[1]}, ...")
    for folder in (Path(word), root / word):
        if folder.is_dir():
            raise UserError(f"{folder} is no run directory (config.yaml is missing); `mmtrain runs ls` lists the runs")
    known = [run.name for run in list_runs(root)] if root.is_dir() else []
    close = nearest(word, known) or [name for name in known if word in name][:3]
    hint = did_you_mean(close) if close else f"under {root} there is {', '.join(known[:10]) or 'none'}"
    raise UserError(f"there is no run {word}; {hint}")

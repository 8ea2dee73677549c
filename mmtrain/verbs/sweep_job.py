"""One job of a sweep: its place in sweep.json, and the processes that train and then evaluate it."""

import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtrain.config.sweep import Job
from mmtrain.track import redact
from mmtrain.train.checkpoint import newest
from mmtrain.train.status import read_status
from mmtrain.train.stop import ASKING, terminate_when_orphaned
from mmtrain.train.supervise import FINISHED

PROGRAM = (sys.executable, "-m", "mmtrain")
WAITING, RUNNING, FAILED = "waiting", "running", "failed"
LOG = "logs/sweep.log"
CLAIM = ".sweep.lock"  # in a run directory: held by the process of the job, also when the sweep is gone
WORKERS_CLAIM = ".lock"  # the same of the worker of rank 0
GRACE_SECONDS = 20.0  # between SIGTERM and SIGKILL, when the user cannot wait
COMPLAINT = re.compile(r"(\[rank\d+\]: *)?(mmtrain: .|[\w.]*(Error|Exception|Interrupt)\b)")
ABOVE = "printed above"  # in a complaint that points to an earlier one


@dataclass
class Entry:
    """What sweep.json says of a job."""

    name: str
    overrides: list[str]
    run: str
    state: str = WAITING
    exit_code: int | None = None
    reason: str = ""
    seconds: float = 0.0
    """Of training and evaluation so far, over all starts."""

    @property
    def folder(self) -> Path:
        return Path(self.run)


@dataclass
class Running:
    """A job that has been started; `poll` moves it on."""

    job: Job
    entry: Entry
    environment: Mapping[str, str]
    claim: int
    """Descriptor of the claim on its run directory; its processes inherit it."""
    commands: list[list[str]]
    process: "subprocess.Popen[bytes] | None" = None
    guard: "subprocess.Popen[bytes] | None" = None
    started: float = field(default_factory=time.monotonic)
    log_start: int = 0

    @property
    def log(self) -> Path:
        return self.entry.folder / LOG

    def poll(self, stopping: bool) -> bool:
        """Start what comes next; True when there is nothing more, and the entry says how it ended."""
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return False
            self._bury()
            status = read_status(self.entry.folder)
            is_trained = bool(status and status.state == FINISHED)
            if code or not is_trained:
                return self._end(code, stopping)
        if not self.commands:
            return self._end(0, stopping)
        if stopping:
            return self._end(None, stopping)
        self._start(self.commands.pop(0))
        return False

    def terminate(self) -> None:
        """Ask for the end: training finishes its step and saves."""
        if self.process is not None:
            self.process.terminate()

    def end_at_once(self) -> None:
        """End all processes of the job, within seconds."""
        if self.process is not None:
            self.process.terminate()  # the second one
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_SECONDS)
            self.process.kill()
            self._bury()
        self._end(None, stopping=True)

    def _start(self, words: list[str]) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self.log_start = log.tell()
            log.write(f"$ {redact(shlex.join(['mmtrain', *words]))}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                [*PROGRAM, *words],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal is for the sweep
                pass_fds=[self.claim],
            )
        self.guard = terminate_when_orphaned(self.process.pid)

    def _bury(self) -> None:
        assert self.process is not None and self.guard is not None
        self.process.wait()
        self.guard.kill()
        self.guard.wait()
        self.process = None

    def _end(self, code: int | None, stopping: bool) -> bool:
        entry, status = self.entry, read_status(self.entry.folder)
        entry.seconds += time.monotonic() - self.started
        entry.exit_code, entry.reason = code, ""
        if code == 0 and status and status.state == FINISHED:
            entry.state = FINISHED
        elif code and not stopping and signal_of(code) not in ASKING:
            number, last = signal_of(code), reason_of(self.log, self.log_start)
            entry.state, entry.reason = FAILED, f"killed ({number.name})" if number else last or f"exit code {code}"
        else:
            entry.state = WAITING
            entry.reason = f"stopped at step {status.step}" if status else "stopped before its first step"
        os.close(self.claim)
        return True


def start(job: Job, entry: Entry, tasks: list[str], environment: Mapping[str, str]) -> Running | None:
    """The job, ready to be polled; None while a process that an earlier sweep left behind is still about to stop."""
    entry.folder.mkdir(parents=True, exist_ok=True)
    claim = os.open(entry.folder / CLAIM, os.O_RDWR | os.O_CREAT, 0o644)
    workers = os.open(entry.folder / WORKERS_CLAIM, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(workers, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(claim)
        return None
    finally:
        os.close(workers)
    commands = [["train", *job.overrides]]
    for task in tasks:
        if task == "shapes" and job.config.corpus.kind != "shapes":
            continue  # a sweep over corpora: the others have no ground truth
        if not is_measured(entry.folder, task):
            # Without task= the section of the run counts, with what the sweep set in it.
            words = [] if job.config.task.name == task else [f"task={task}"]
            commands.append(["evaluate", f"run={entry.run}", *words])
    entry.state, entry.exit_code, entry.reason = RUNNING, None, ""
    return Running(job, entry, environment, claim, commands)


def is_measured(run: Path, task: str) -> bool:
    """Whether RUN/evaluation-TASK.json is of the newest checkpoint."""
    try:
        record: dict[str, Any] = json.loads((run / f"evaluation-{task}.json").read_text())
    except (OSError, ValueError):
        return False
    checkpoint = newest(run / "checkpoints")
    return checkpoint is not None and record.get("checkpoint") == checkpoint.path.name


def signal_of(code: int) -> signal.Signals | None:
    """The signal that ended a process with this exit code, its own or as `mmtrain` says it (128 + number)."""
    number = -code if code < 0 else code - 128
    return signal.Signals(number) if number in set(signal.Signals) else None


def reason_of(log: Path, start: int = 0) -> str:
    """Why a command failed: the last complaint in its log from byte `start` on, or else the last line; "" if empty."""
    with open(log, "rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()[1:] if line.strip()]
    complaints = [line for line in lines if COMPLAINT.match(line) and ABOVE not in line]
    return (complaints or lines or [""])[-1].removeprefix("mmtrain: ")[:500]

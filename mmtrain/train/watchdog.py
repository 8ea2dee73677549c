"""A process that hangs writes down where, and ends: with a limit of its own for each section of a step."""

import contextlib
import faulthandler
import json
import math
import os
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import IO, NamedTuple

from mmtrain.config import write_text_atomic
from mmtrain.config.schema import HealthConfig

EXIT_HUNG = 3
SETUP = "setup"
# The setting of each section. "reduce": sums over ranks outside of the backward pass (loss weights, losses).
SETTINGS = {SETUP: "setup_seconds", "data": "data_seconds", "reduce": "step_seconds", "forward": "step_seconds",
            "backward": "step_seconds", "step": "step_seconds", "evaluate": "evaluate_seconds",
            "checkpoint": "checkpoint_seconds"}  # fmt: skip
TICK_SECONDS = 0.25
LATE_SECONDS = 2.0  # a tick that comes later by more: the process was stopped, or could not run
REARM_SECONDS = 3.0
CALLBACK_SECONDS = 10.0
MOST_MARK_BYTES = 1 << 16
MOST_NAMED = 8


def section_limits(health: HealthConfig) -> dict[str, float]:
    """Seconds by section; 0: no limit."""
    return {section: getattr(health, setting) for section, setting in SETTINGS.items()}


def process_group_timeout(health: HealthConfig) -> timedelta:
    """How long a collective may wait: longer than any section, so that the watchdog speaks before the backend does.

    A rank waits in a collective for one that is in any other section; its own limit comes first, whichever that is.
    A section without a limit may take a year.
    """
    limits = section_limits(health).values()
    return timedelta(seconds=max(limits) + 600) if all(limits) else timedelta(days=365)


class Armed(NamedTuple):
    """A section that is being watched; times are of the monotonic clock."""

    section: str
    started: float
    limited_by: str
    """The section whose limit counts: setup until the first step is done."""
    seconds: float
    until: float


def armed(section: str, limited_by: str, seconds: float) -> Armed:
    """A section that begins now; seconds: its limit, 0 for none."""
    now = time.monotonic()
    return Armed(section, now, limited_by, seconds, now + seconds if seconds else math.inf)


class Watchdog:
    """Ends this process when a section takes longer than its limit.

    Before that it writes the Python stacks of all threads to FOLDER/hang-rank-N.txt, a mark for `read_hangs` to
    FOLDER/hang-rank-N.json, one sentence to stderr, and calls `on_hang` in a thread, for CALLBACK_SECONDS at most.
    A section lasts until the next one is entered, so that no moment of a step is unwatched; on a CUDA device it is the
    one in which the host waits, maybe for kernels launched in an earlier one. Limits are of the monotonic clock; time
    in which the process was stopped (SIGSTOP, a frozen virtual machine) does not count.

    A call that never gives back Python's global lock stops the watching thread, too. Then a thread of faulthandler,
    which needs no lock, writes the stacks `backstop_seconds` after the limit and ends the process with exit code 1,
    without a mark. It cannot tell such a call from a process stopped for longer than limit and backstop together.

    `faulthandler.dump_traceback_later` must not be used for anything else in this process.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        limits: Mapping[str, float],
        on_hang: Callable[["Hang"], None] | None = None,
        exit_code: int = EXIT_HUNG,
        backstop_seconds: float = 10.0,
    ):
        self.rank, self.limits, self.exit_code, self.backstop_seconds = rank, dict(limits), exit_code, backstop_seconds
        self.step, self.entered = 0, 0
        self._on_hang = on_hang
        self._setup: Armed | None = armed(SETUP, SETUP, self.limits[SETUP])
        self._armed: Armed | None = self._setup
        self._begun = False
        self._forgiven = 0.0
        """Seconds of the section in which this process could not run."""
        self._backstop_at = math.inf
        self._lock = threading.Lock()
        self._mark, self._stacks = mark_files(folder, rank)
        self._file = fresh_files(folder, rank)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def start_step(self, step: int) -> None:
        """The update that leads to `step` begins; setup ends with the beginning of the second."""
        self.step, self.entered = step, 0
        if self._begun:
            self._setup = None
        self._begun = True

    def enter(self, section: str) -> None:
        """Begin a section, which ends the one before. Raises KeyError for a section without a limit."""
        limit, setup = self.limits[section], self._setup
        self.entered += 1
        self._armed = now = setup._replace(section=section) if setup else armed(section, section, limit)
        if now.until + self.backstop_seconds < self._backstop_at:  # the thread may never get to it
            self._arm_backstop()

    def pause(self) -> None:
        """Watch nothing until the next section is entered."""
        self._armed = None

    def close(self) -> None:
        """Watch nothing any more."""
        if self._file.closed:
            return
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if os.fstat(self._file.fileno()).st_size == 0:
            self._stacks.unlink(missing_ok=True)
        self._file.close()

    def _watch(self) -> None:
        watched, ticked, rearmed = self._armed, time.monotonic(), -math.inf
        # Sooner than the backstop of a section that ended just before its limit would act.
        rearm_seconds = min(REARM_SECONDS, self.backstop_seconds / 2)
        wait = TICK_SECONDS
        while not self._closed.wait(wait):
            now, current = time.monotonic(), self._armed
            late, ticked = now - ticked - wait, now
            if current is None or watched is None or current.started != watched.started:
                self._forgiven = 0.0
            watched = current
            if current and late > LATE_SECONDS:
                self._forgiven += min(late, now - current.started)
            if current and (left := current.until + self._forgiven - now) <= 0:
                self._end(current, current.seconds - left)
            if now - rearmed >= rearm_seconds or late > LATE_SECONDS:
                self._arm_backstop()
                rearmed = now
            wait = min(TICK_SECONDS, left) if current else TICK_SECONDS

    def _arm_backstop(self) -> None:
        with self._lock:
            current = self._armed
            until = current.until + self._forgiven + self.backstop_seconds if current else math.inf
            faulthandler.cancel_dump_traceback_later()
            if until < math.inf:
                left = max(until - time.monotonic(), self.backstop_seconds)
                faulthandler.dump_traceback_later(left, exit=True, file=self._file)
            self._backstop_at = until

    def _end(self, ended: Armed, seconds: float) -> None:
        """Tell and exit. Each part may fail or wait (a file system that hangs), and none of them may keep the rest."""
        faulthandler.dump_traceback_later(CALLBACK_SECONDS + self.backstop_seconds, exit=True, file=self._file)
        setting = f"health.{SETTINGS.get(ended.limited_by, ended.limited_by)}"
        host = socket.gethostname()
        hang = Hang(self.rank, ended.section, host, self.step, self.entered, round(seconds, 1), setting)
        sentence = f"{hang}, longer than {setting}={ended.seconds:g}"
        with contextlib.suppress(Exception):
            print(f"mmtrain: {sentence}; its stacks: {self._stacks}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            self._file.write(f"{sentence}\n".encode())
            faulthandler.dump_traceback(self._file, all_threads=True)
            os.fsync(self._file.fileno())
        with contextlib.suppress(Exception):
            write_text_atomic(self._mark, json.dumps(asdict(hang)))
        if self._on_hang:
            callback = threading.Thread(target=self._on_hang, args=(hang,), daemon=True)
            callback.start()
            callback.join(CALLBACK_SECONDS)
        os._exit(self.exit_code)


@dataclass(frozen=True)
class Hang:
    """Where a rank hung; section, host and setting are empty when it could not write its mark."""

    rank: int
    section: str = ""
    host: str = ""
    step: int = 0
    entered: int = 0
    """Sections entered in this step."""
    seconds: float = 0.0
    setting: str = ""

    @property
    def progress(self) -> tuple[int, int]:
        """How far it came: all ranks go through the same sections."""
        return self.step, self.entered

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} hangs in {self.section} of step {self.step} for {self.seconds:.0f} s"


def mark_files(folder: Path, rank: int) -> tuple[Path, Path]:
    """The mark and the stacks of a rank."""
    return folder / f"hang-rank-{rank}.json", folder / f"hang-rank-{rank}.txt"


def fresh_files(folder: Path, rank: int) -> IO[bytes]:
    """Open the file for this rank's stacks, unbuffered; stacks of an earlier start are kept as .old.

    Rank 0 also puts away what is there of ranks that this start may not have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark, stacks = mark_files(folder, rank)
    for old in folder.glob("hang-rank-*.json") if rank == 0 else [mark]:
        old.unlink(missing_ok=True)
    for old in folder.glob("hang-rank-*.txt") if rank == 0 else [stacks]:
        with contextlib.suppress(FileNotFoundError):  # its own rank was faster
            if old.stat().st_size:
                old.replace(old.with_suffix(".old"))
    return open(stacks, "wb", buffering=0)


def read_hangs(folder: Path) -> list[Hang]:
    """The ranks that ended themselves in the last start, by rank."""
    hangs = []
    for stacks in folder.glob("hang-rank-*.txt"):
        number = re.fullmatch(r"hang-rank-(\d{1,7})", stacks.stem)
        if number and stacks.stat().st_size:
            rank = int(number[1])
            hangs.append(read_mark(mark_files(folder, rank)[0], rank))
    return sorted(hangs, key=lambda hang: hang.rank)


def read_mark(file: Path, rank: int) -> Hang:
    """The mark of a rank; an empty one when it is missing or damaged."""
    empty = Hang(rank)
    try:
        with open(file, "rb") as opened:
            hang = Hang(**json.loads(opened.read(MOST_MARK_BYTES)))
    except (OSError, ValueError, TypeError, RecursionError):
        return empty
    right = all(type(getattr(hang, f.name)) is type(getattr(empty, f.name)) for f in fields(Hang))
    return hang if right and hang.rank == rank else empty


def explain_hangs(hangs: Sequence[Hang], size: int) -> str:
    """Which of `size` ranks the others waited for, in one sentence.

    A collective ends for all or for none: the ranks to look at are those that hang at another place than most, or
    left no mark.
    """
    marks = [hang for hang in hangs if hang.section]
    if not marks:
        return "no rank could say where it hung (something held Python's global lock, or it was stopped for long)"
    places = Counter(hang.progress for hang in marks)
    most = max(places, key=lambda place: (places[place], place))
    waiting = next(hang for hang in marks if hang.progress == most)
    place = f"{waiting.section} of step {waiting.step} for {waiting.seconds:.0f} s"
    elsewhere = [str(hang) for hang in marks if hang.progress != most]
    found = elsewhere[:MOST_NAMED]
    if len(elsewhere) > MOST_NAMED:
        found.append(f"{len(elsewhere) - MOST_NAMED} more hang elsewhere, too")
    if stuck := [hang.rank for hang in hangs if not hang.section]:
        found.append(f"{_ranks(stuck)} could not say where (something held Python's global lock; see the stacks)")
    if silent := sorted(set(range(size)) - {hang.rank for hang in hangs}):
        found.append(f"{_ranks(silent)} left no mark (killed or stopped, its host lost, or within a longer limit)")
    if found:
        return "; ".join([*found, f"the others waited in {place}"])
    if size == 1:
        return str(waiting)
    return f"all {size} ranks hang in {place}: a collective that never ends, as when the network between hosts fails"


def _ranks(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:MOST_NAMED]))
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {named}{more}"

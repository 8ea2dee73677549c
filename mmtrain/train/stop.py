"""Signals that ask a command to come to an end; to `mmtrain train` they become the file RUN/stop, which the workers
obey on whatever host they are.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

STOP = "stop"
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
FINAL = (signal.SIGINT, signal.SIGTERM)  # SIGUSR1 announces a time limit: the SIGTERM that follows is still the first


class StopSignals:
    """While open, a signal only makes `asked` true; a second one raises SystemExit."""

    def __init__(self, doing: str, afterwards: str) -> None:
        """Both are for the user: what happens now, and what after a second signal."""
        self.asked = False
        self._doing, self._afterwards = doing, afterwards
        self._finals = 0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in ASKING:
            previous = signal.getsignal(number)
            if number != signal.SIGHUP or previous != signal.SIG_IGN:  # nohup
                self._previous[number] = previous
                signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._finals += number in FINAL
        if self._finals > 1:
            _say(f"ending at once; {self._afterwards}")
            sys.exit(128 + number)
        if not self.asked:
            self.asked = True
            _say(f"{self._doing}; press Ctrl-C again to end at once")


class StopRequest(StopSignals):
    """While open, a signal asks the workers of `run_dir` to save and stop; a second one raises SystemExit."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__("stopping after this step, saving", "the same command goes on from the last checkpoint")
        self.file = run_dir / STOP

    def __enter__(self) -> Self:
        self.file.unlink(missing_ok=True)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self.file.unlink(missing_ok=True)

    def insist(self) -> None:
        """Ask again: a worker that has just started takes the file for one of an earlier run, and removes it."""
        if self.asked:
            self.file.touch()

    def sleep(self, seconds: float) -> None:
        """Wait, but no longer than until somebody asks to stop."""
        end = time.monotonic() + seconds
        while not self.asked and time.monotonic() < end:
            time.sleep(0.1)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        super()._ask(number, frame)
        self.insist()


def stop_when_orphaned(run_dir: Path) -> "subprocess.Popen[bytes]":
    """Start a shell that asks the workers of `run_dir` to stop as soon as this process is gone, however it ended.

    They are in a session of their own, on other hosts too, and would train on without anybody who minds them.
    """
    command = ["sh", "-c", 'read -r nothing; : > "$0"', str(run_dir / STOP)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def terminate_when_orphaned(child: int) -> "subprocess.Popen[bytes]":
    """Start a shell that sends SIGTERM to the process `child` as soon as this process is gone, however it ended.

    Kill the shell once the child has ended: its number may come to be another's.
    """
    command = ["sh", "-c", 'read -r nothing; kill -TERM "$0"', str(child)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)


def _say(sentence: str) -> None:
    # Not print: the signal may have come in the middle of one.
    os.write(2, f"\nmmtrain: {sentence}\n".encode())

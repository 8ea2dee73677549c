"""Signals to `mmtrain train` become the file RUN/stop, which the workers obey on whatever host they are."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType

STOP = "stop"
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
FINAL = (signal.SIGINT, signal.SIGTERM)  # SIGUSR1 announces a time limit: the SIGTERM that follows is still the first


class StopRequest:
    """While open, a signal asks the workers of `run_dir` to save and stop; a second one raises SystemExit."""

    def __init__(self, run_dir: Path) -> None:
        self.file = run_dir / STOP
        self.asked = False
        self._finals = 0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        self.file.unlink(missing_ok=True)
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
        self._finals += number in FINAL
        if self._finals > 1:
            _say("ending at once; the same command goes on from the last checkpoint")
            sys.exit(128 + number)
        if not self.asked:
            self.asked = True
            self.file.touch()
            _say("stopping after this step, saving; press Ctrl-C again to end at once")


def stop_when_orphaned(run_dir: Path) -> "subprocess.Popen[bytes]":
    """Start a shell that asks the workers of `run_dir` to stop as soon as this process is gone, however it ended.

    They are in a session of their own, on other hosts too, and would train on without anybody who minds them.
    """
    command = ["sh", "-c", 'read -r nothing; : > "$0"', str(run_dir / STOP)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _say(sentence: str) -> None:
    # Not print: the signal may have come in the middle of one.
    os.write(2, f"\nmmtrain: {sentence}\n".encode())

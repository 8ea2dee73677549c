"""The process that brings a run to W&B while it trains: `python -m mmtrain.track.follow RUN online|offline PID`.

It reads what training (process PID) writes into the run directory, and nothing waits for it: a server that is away,
slow or broken costs training nothing, and a training process that is killed loses no row. Rank 0 writes a line of JSON
to its standard input for every alert and for the end; what it prints is for the user.
"""

import contextlib
import fcntl
import json
import os
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mmtrain.track.wandb_run import Mode, WandbRun, explain, first_line

LOCK = "wandb/.lock"
POLL_SECONDS = 1.0
REST_SECONDS = 30.0  # between two looks for checkpoints and samples
RETRY_SECONDS = 60.0
FINISH_SECONDS = 60.0


class Orders:
    """What comes from the training process: alerts, and the end; its death is an end, too."""

    def __init__(self, descriptor: int, training: int):
        self._descriptor, self.training = descriptor, training
        self._text = b""
        self._has_failed = False
        self.alerts: list[dict[str, str]] = []
        self.ended = False
        self.exit_code = 1

    def wait(self, seconds: float) -> None:
        """Take in what comes within `seconds`; returns as soon as something does."""
        if self.ended:
            return
        comes = select.select([self._descriptor], [], [], seconds)[0]
        if not comes and os.getppid() == self.training:
            return
        # Processes that training has forked may keep the pipe open when it is gone.
        data = os.read(self._descriptor, 1 << 16) if comes else b""
        if not data:
            self.ended = True
            if not self._has_failed:
                text = "the training process is gone without a word: killed, or its host lost"
                self.alerts.append({"title": "Training died", "text": text, "level": "ERROR"})
            return
        *lines, self._text = (self._text + data).split(b"\n")
        for order in map(json.loads, lines):
            if "exit_code" in order:
                self.ended, self.exit_code = True, order["exit_code"]
            else:
                self._has_failed |= order["level"] == "ERROR"
                self.alerts.append(order)


def follow(run_dir: Path, mode: Mode, orders: Orders) -> bool:
    """Send the run until training ends; False when W&B did not take all of it."""
    wandb_run, said = None, ""
    while wandb_run is None:
        try:
            wandb_run = WandbRun(run_dir, mode, run_dir, FINISH_SECONDS, orders.training)
        except (Exception, SystemExit) as error:  # wandb.teardown() may call sys.exit()
            if (why := explain(error)) != said:
                say(f"{why}; training goes on, and its rows are kept for W&B.")
                said = why
            if mode == "offline" or not wait_for_another_try(orders):
                return False
    if mode == "online":
        say(f"W&B: {wandb_run.url}")
    looked = 0.0
    while True:
        orders.wait(POLL_SECONDS)
        is_last = orders.ended
        wandb_run.send_rows()
        while orders.alerts:
            wandb_run.alert(**orders.alerts.pop(0))
        if is_last or time.monotonic() - looked > REST_SECONDS:
            try:
                wandb_run.send_rest()
            except (OSError, ValueError) as error:  # a picture that is none must not cost the rows
                if (why := first_line(error)) != said:
                    say(f"W&B was not given all pictures and checkpoints ({why}).")
                    said = why
            looked = time.monotonic()
        if is_last:
            return wandb_run.finish(orders.exit_code)


def wait_for_another_try(orders: Orders) -> bool:
    """Free the run's id, which the failed start still holds, and wait; False when training has ended meanwhile."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
    until = time.monotonic() + RETRY_SECONDS
    while (left := until - time.monotonic()) > 0 and not orders.ended:
        orders.wait(left)
    return not orders.ended


@contextlib.contextmanager
def alone(run_dir: Path, wait: bool) -> Iterator[IO[str]]:
    """Only one process at a time sends a run. wait: for the other one to end; else raises BlockingIOError."""
    (run_dir / LOCK).parent.mkdir(parents=True, exist_ok=True)
    with open(run_dir / LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield file


def say(sentence: str) -> None:
    """One line for the user; the process that reads it may be gone."""
    with contextlib.suppress(OSError):
        print(sentence, flush=True)


def main(argv: list[Any]) -> int:
    """0 when W&B has everything, 1 when not."""
    run_dir, mode, training = Path(argv[0]), argv[1], int(argv[2])
    try:
        with alone(run_dir, wait=True):
            return 0 if follow(run_dir, mode, Orders(sys.stdin.fileno(), training)) else 1
    except Exception as error:
        say(f"W&B failed ({first_line(error)}); training goes on without it, metrics.jsonl is kept.")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Weights & Biases from the training process: starts the process that follows the run (`follow`), and tells it little.

No call here waits for it, but `close` at the very end, for a bounded time. `auto` goes online when a key is at hand
(WANDB_API_KEY or a netrc login) and stays offline otherwise.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmtrain.config import TrackConfig
from mmtrain.track.follow import FINISH_SECONDS
from mmtrain.track.wandb_run import has_login, resolve_mode

SHARE_TO_WAIT = 0.01  # of the training time, at its end
LEAST_SECONDS_TO_WAIT = 10.0


class WandbSink:
    """One start of a run on W&B. `say` gets one line per thing that the user should know."""

    def __init__(self, run_dir: Path, track: TrackConfig, run_id: str, say: Callable[[str], None] = print):
        self._say, self._run_dir, self._started = say, run_dir, time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        self.mode = resolve_mode(track.wandb)
        if self.mode == "disabled":
            return
        if self.mode == "online" and not has_login():  # wandb would ask for a key, and nobody may be there
            say("W&B has no key (set WANDB_API_KEY or run `wandb login`); logging offline.")
            self.mode = "offline"
        try:
            self._start(run_id)
        except OSError as error:
            self._say(f"W&B failed to start ({error}); training goes on without it, metrics.jsonl is kept.")

    def _start(self, run_id: str) -> None:
        (self._run_dir / "run_id").write_text(run_id)
        command = [sys.executable, "-m", "mmtrain.track.follow", str(self._run_dir), self.mode, str(os.getpid())]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is for training
        )
        assert self._process.stdin
        os.set_blocking(self._process.stdin.fileno(), False)
        self._reader = threading.Thread(target=self._forward, args=(self._process,), name="W&B", daemon=True)
        self._reader.start()

    def _forward(self, process: "subprocess.Popen[bytes]") -> None:
        """In a thread: what the process says is for the user."""
        assert process.stdout
        for line in process.stdout:
            self._say(line.decode(errors="replace").rstrip())

    @property
    def sync_command(self) -> str:
        """What sends W&B what it does not have."""
        return f"mmtrain sync {min(os.path.relpath(self._run_dir), str(self._run_dir), key=len)}"

    def alert(self, title: str, text: str, level: str) -> None:
        """Have W&B tell the user. level: INFO, WARN or ERROR."""
        self._tell({"title": title, "text": text, "level": level})

    def close(self, exit_code: int = 0) -> None:
        """Give W&B 1 % of the training time, at least 10 s, to take the rest. Safe to call twice.

        An offline file takes no time worth speaking of, and always gets it.
        """
        process = self._process
        if process is None:
            return
        seconds = max(LEAST_SECONDS_TO_WAIT, SHARE_TO_WAIT * (time.monotonic() - self._started))
        seconds = FINISH_SECONDS if self.mode == "offline" else min(seconds, FINISH_SECONDS)
        self._tell({"exit_code": exit_code})
        self._process = None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = _kill(process)
        self._reader.join(LEAST_SECONDS_TO_WAIT)
        if code:
            self._say(f"W&B does not have all of this run yet; to send the rest: {self.sync_command}")
        elif self.mode == "offline":
            self._say(f"W&B kept this run offline; to upload it: {self.sync_command}")

    def _tell(self, order: dict[str, Any]) -> None:
        """Never waits: an order that the pipe has no room for is left out."""
        if self._process and self._process.stdin:
            with contextlib.suppress(OSError):
                os.write(self._process.stdin.fileno(), json.dumps(order).encode() + b"\n")


def _kill(process: "subprocess.Popen[bytes]") -> int:
    """End the process and wandb's own, which would outlive it for a while; returns the exit code."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            child.kill()
    return process.wait()

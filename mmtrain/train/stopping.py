"""Stop requests: one rank hears of it, all ranks stop after the same step.

SIGTERM and SIGUSR1 to any rank, or a file RUN/stop, which reaches ranks on other hosts too.
"""

import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from mmtrain.train.distributed import World

STOP_FILE = "stop"
REASONS = ("", "SIGTERM", "SIGUSR1", f"the file {STOP_FILE}")
LOOK_SECONDS = 1.0  # between two looks at the file, which may lie on a slow shared file system


class Stopping:
    """A vote of all ranks, once per step: `ask` starts it, `agreed` ends it; the step hides what it takes.

    It runs between hosts (gloo), not on the devices, and so never waits for them.
    """

    def __init__(self, run_dir: Path, world: World):
        self.file, self.world = run_dir / STOP_FILE, world
        self.reason = ""
        """Why all ranks stop; empty while they go on."""
        self._heard = 0
        self._looked = time.monotonic()
        self._vote = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None

    def listen(self) -> None:
        """Handle the signals from now on, until this process ends: one that comes after the last step must not end
        it in the middle of its farewell. A file left by an earlier run is removed."""
        self.forget()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._hear)

    def forget(self) -> None:
        """Remove the file, on rank 0."""
        if self.world.rank == 0:
            self.file.unlink(missing_ok=True)

    def ask(self) -> None:
        """Begin the vote; every rank must call it at the same places."""
        if self.reason:
            return
        if not self._heard and self.world.rank == 0 and time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            if self.file.exists():
                self._heard = REASONS.index(f"the file {STOP_FILE}")
        self._vote.fill_(self._heard)
        if self.world.size > 1:
            self._work = dist.all_reduce(self._vote, dist.ReduceOp.MAX, group=self.world.control, async_op=True)

    def agreed(self) -> bool:
        """The outcome of the vote, the same on all ranks; once true, always true."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        self.reason = self.reason or REASONS[int(self._vote)]
        return bool(self.reason)

    def _hear(self, number: int, frame: object) -> None:
        self._heard = REASONS.index(signal.Signals(number).name)

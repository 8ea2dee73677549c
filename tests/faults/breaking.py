"""What breaks: hooks for `tests.faults.ranks.started`, called in every rank before the worker starts."""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

Action = Callable[[Any], None]


def at(step: int, rank: int, action: Action) -> Callable[[int], None]:
    """Do `action(run)` on `rank` as it begins the training step after `step` steps."""
    return partial(_at, step, rank, action)


def _at(step: int, only: int, action: Action, rank: int) -> None:
    from mmtrain.train import loop

    original = loop.forward_backward
    done = []

    def forward_backward(run: Any, *rest: Any, poison: bool = False) -> Tensor:
        if rank == only and run.step >= step and not poison and not done:
            done.append(True)
            action(run)
        return original(run, *rest, poison=poison)

    loop.forward_backward = forward_backward


def within(function: str, rank: int, action: Action, after: int = 0) -> Callable[[int], None]:
    """Do `action(run)` on `rank` as `loop.FUNCTION` (save, evaluate) begins, once, after step `after`."""
    return partial(_within, function, rank, action, after)


def _within(function: str, only: int, action: Action, after: int, rank: int) -> None:
    from mmtrain.train import loop

    original = getattr(loop, function)
    done = []

    def wrapped(run: Any, *rest: Any) -> Any:
        if rank == only and run.step >= after and not done:
            done.append(True)
            action(run)
        return original(run, *rest)

    setattr(loop, function, wrapped)


def send(number: int) -> Action:
    """This rank gets a signal."""
    return partial(_send, number)


def _send(number: int, run: Any) -> None:
    os.kill(os.getpid(), number)


def send_to_all(number: int) -> Action:
    """This rank and all processes that it started get a signal, as Slurm sends it to a whole job."""
    return partial(_send_to_all, number)


def _send_to_all(number: int, run: Any) -> None:
    import psutil

    children = psutil.Process().children(recursive=True)
    assert len(children) >= 2, "the server of the processes that prepare batches, and one of these"
    for process in children:
        process.send_signal(number)
    os.kill(os.getpid(), number)


def at_the_end(rank: int, number: int) -> Callable[[int], None]:
    """Training is done, and `rank` gets a signal while it says goodbye."""
    return partial(_at_the_end, rank, number)


def _at_the_end(only: int, number: int, rank: int) -> None:
    from mmtrain.train import worker

    original = worker.record_end

    def record_end(*rest: Any) -> None:
        os.kill(os.getpid(), number)
        original(*rest)
        os.kill(os.getpid(), number)

    if rank == only:
        worker.record_end = record_end


def sleep(seconds: float) -> Action:
    return partial(_sleep, seconds)


def _sleep(seconds: float, run: Any) -> None:
    time.sleep(seconds)


def scale_backward(factor: float, steps: int = 1) -> Action:
    """The gradient of this rank times `factor` (or NaN) for some backward passes."""
    return partial(_scale_backward, factor, steps)


def _scale_backward(factor: float, steps: int, run: Any) -> None:
    original = run.engine.backward
    left = [steps]

    def backward(total: Tensor, weight: Tensor) -> None:
        left[0] -= 1
        original(total * (factor if left[0] >= 0 else 1.0), weight)

    run.engine.backward = backward


def scale_loss(factor: float, steps: int = 1) -> Action:
    """The loss of this rank, and so its gradient, times `factor` for some forward passes."""
    return partial(_scale_loss, factor, steps)


def _scale_loss(factor: float, steps: int, run: Any) -> None:
    original = run.engine.forward
    left = [steps]

    def forward(batch: Any) -> Any:
        sums = original(batch)
        left[0] -= 1
        return sums._replace(total=sums.total * factor) if left[0] >= 0 else sums

    run.engine.forward = forward


def slow_data(rank: int, seconds: float) -> Callable[[int], None]:
    """Each batch of one rank comes late."""
    return partial(_slow_data, rank, seconds)


def _slow_data(only: int, seconds: float, rank: int) -> None:
    from mmtrain.stream import Batches

    original = Batches.__next__

    def late(self: Batches) -> Any:
        time.sleep(seconds)
        return original(self)

    if rank == only:
        Batches.__next__ = late  # type: ignore[method-assign]


def no_memory(run: Any) -> None:
    """From now on this process gets no more memory: a real failed allocation."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 1_000_000, resource.RLIM_INFINITY))
    import torch

    torch.empty(200_000_000).fill_(1.0)


def clock(jump: float) -> Action:
    """The wall clock jumps by so many seconds."""
    return partial(_clock, jump)


def _clock(jump: float, run: Any) -> None:
    now = time.time
    time.time = lambda: now() + jump


def other_run(only: int, run: Path) -> Callable[[int], None]:
    """One rank is started on another run directory."""
    return partial(_other_run, only, run)


def _other_run(only: int, run: Path, rank: int) -> None:
    if rank == only:
        sys.argv[-1] = str(run)


def other_code(only: int, package: Path) -> Callable[[int], None]:
    """One rank has another version of the program, in `package`."""
    return partial(_other_code, only, package)


def _other_code(only: int, package: Path, rank: int) -> None:
    import mmtrain

    if rank == only:
        mmtrain.__file__ = str(package / "__init__.py")


KILL, TERM, USR1, STOP = send(signal.SIGKILL), send(signal.SIGTERM), send(signal.SIGUSR1), send(signal.SIGSTOP)

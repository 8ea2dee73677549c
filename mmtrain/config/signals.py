"""Signals that a whole job gets are for one process of it."""

import contextlib
import signal
from collections.abc import Iterator

OF_A_JOB = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What a terminal, Slurm or Kubernetes sends to every process of a job to end it or to announce its end."""


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes and threads started within never get the signals of a job: their parent decides when they end.

    The parent gets them after the block.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, OF_A_JOB)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)

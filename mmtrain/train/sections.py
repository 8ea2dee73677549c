"""Seconds per section of a step on this rank, and which rank is slow where no rank waits for another."""

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

import torch

ON_DEVICE = frozenset({"forward", "backward", "step"})
ALONE = ("data", "forward")  # without a collective, except that ZeRO stage 3 gathers parameters in the forward pass
SHARE_OF_NOISE = 0.05
MOST_PENDING = 1024


class Sections:
    """Measures `with sections("data"): ...`, one section at a time.

    On a CUDA device the host only launches forward, backward and step: their seconds are those between events on the
    current stream. Nothing here waits for the device.
    on_enter: is told the name of every section that begins (`Watchdog.enter`).
    """

    def __init__(self, device: torch.device, on_enter: Callable[[str], None] | None = None):
        self._events = DeviceTimes() if device.type == "cuda" else None
        self._on_enter = on_enter
        self._seconds: dict[str, float] = {}
        self._name = ""
        self._started: Any = 0.0

    def __call__(self, name: str) -> "Sections":
        """The context manager of one section; it is `self`, which costs less than a new object."""
        if self._name:
            raise RuntimeError(f"section {name} begins inside section {self._name}")
        self._name = name
        return self

    def __enter__(self) -> None:
        if self._on_enter:
            self._on_enter(self._name)
        if self._events and self._name in ON_DEVICE:
            self._started = self._events.mark()
        else:
            self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        name, self._name = self._name, ""
        if self._events and name in ON_DEVICE:
            self._events.add(name, self._started, self._events.mark(), self._seconds)
        else:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - self._started

    def take(self) -> dict[str, float]:
        """Seconds by section since the last call; what the device has not finished is in the next one's."""
        if self._events:
            self._events.collect(self._seconds)
        seconds, self._seconds = self._seconds, {}
        return seconds


class DeviceTimes:
    """Pairs of CUDA events, read once the device has passed them, then used again."""

    def __init__(self) -> None:
        self._free: list[Any] = []
        self._pending: deque[tuple[str, Any, Any]] = deque()

    def mark(self) -> Any:
        """An event at this place of the current stream."""
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, start: Any, end: Any, seconds: dict[str, float]) -> None:
        """Keep a pair of events until the device has passed it."""
        self._pending.append((name, start, end))
        if len(self._pending) > MOST_PENDING:
            self.collect(seconds)

    def collect(self, seconds: dict[str, float]) -> None:
        """Add the pairs that the device has passed to `seconds`, without waiting for the others."""
        while self._pending and self._pending[0][2].query():
            name, start, end = self._pending.popleft()
            seconds[name] = seconds.get(name, 0.0) + start.elapsed_time(end) / 1000
            self._free += (start, end)


@dataclass(frozen=True)
class Straggler:
    """A rank that took `ratio` times the median of all ranks for a section."""

    rank: int
    section: str
    ratio: float

    def __str__(self) -> str:
        return f"rank {self.rank} takes {self.ratio:.1f} times the median of all ranks for {self.section}"


def stragglers(
    by_rank: Sequence[dict[str, float]], factor: float, sections: Collection[str] = ALONE
) -> list[Straggler]:
    """Ranks that took more than `factor` times the median in a section; the slowest first.

    by_rank: `Sections.take` of every rank over the same steps. sections: those in which a rank waits for no other, as
    the wait of the others would be blamed on them: ("data",) at ZeRO stage 3.
    The median of an even number of ranks is the lower one, so that one of two ranks can be a straggler. An excess of
    at most 5 % of the window's time is noise.
    """
    window = max((sum(seconds.values()) for seconds in by_rank), default=0.0)
    found = []
    for section in sections:
        times = [seconds.get(section, 0.0) for seconds in by_rank]
        middle = median_low(times) if times else 0.0
        for rank, seconds in enumerate(times):
            if seconds > factor * middle and seconds - middle > SHARE_OF_NOISE * window:
                found.append(Straggler(rank, section, seconds / middle if middle else float("inf")))
    return sorted(found, key=lambda straggler: -straggler.ratio)

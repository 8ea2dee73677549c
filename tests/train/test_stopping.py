"""The vote on a stop, of one rank; that of several is in tests/faults and tests/cluster."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmtrain.train import stopping
from mmtrain.train.distributed import World
from mmtrain.train.stopping import Stopping

ALONE = World(0, 1, torch.device("cpu"))
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The handlers of this process, as they were."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def vote(stop: Stopping) -> bool:
    stop.ask()
    return stop.agreed()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_the_reason_for_all_later_votes(number: signal.Signals, tmp_path: Path) -> None:
    stop = Stopping(tmp_path, ALONE)
    stop.listen()
    assert not vote(stop) and not stop.reason
    os.kill(os.getpid(), number)
    assert vote(stop) and vote(stop) and stop.reason == number.name


def test_a_signal_within_a_vote_counts_in_the_next(tmp_path: Path) -> None:
    stop = Stopping(tmp_path, ALONE)
    stop.listen()
    stop.ask()
    os.kill(os.getpid(), signal.SIGTERM)
    assert not stop.agreed() and vote(stop)


def test_the_file_counts_from_now_on_and_is_looked_at_once_in_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stop").touch()
    stop = Stopping(tmp_path, ALONE)
    stop.listen()
    assert not (tmp_path / "stop").exists(), "of an earlier run"
    (tmp_path / "stop").touch()
    assert not vote(stop), "not yet looked at again"
    monkeypatch.setattr(stopping, "LOOK_SECONDS", 0.0)
    assert vote(stop) and stop.reason == "the file stop"
    stop.forget()
    assert not (tmp_path / "stop").exists()

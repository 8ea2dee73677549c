"""Real processes that hang; the functions called `*_case` are what runs in them."""

import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmtrain.config.schema import HealthConfig
from mmtrain.train import watchdog as module
from mmtrain.train.launch import free_port
from mmtrain.train.watchdog import (
    EXIT_HUNG,
    Hang,
    Watchdog,
    explain_hangs,
    process_group_timeout,
    read_hangs,
    section_limits,
)

SHORT = {"setup": 60.0, "data": 1.0, "backward": 1.0, "evaluate": 0.0}
BACKSTOP_EXIT = 1
# One process imports everything, all others are forks of it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


def watchdog(folder: Path, rank: int = 0, **limits: float) -> Watchdog:
    """In step 7, with the limits SHORT unless told otherwise."""
    dog = Watchdog(folder, rank, SHORT | limits, backstop_seconds=1.0)
    for step in (6, 7):
        dog.start_step(step)
    return dog


def enter(dog: Watchdog, section: str, parent: Connection) -> None:
    parent.send(time.monotonic())
    dog.enter(section)


def sleep_case(folder: Path, parent: Connection) -> None:
    enter(watchdog(folder), "data", parent)
    time.sleep(60)


def lock_case(folder: Path, parent: Connection) -> None:
    enter(watchdog(folder), "data", parent)
    re.match(r"(a+)+$", "a" * 60 + "b")  # takes exponential time, and never gives back Python's global lock


def lock_after_a_section_without_limit_case(folder: Path, parent: Connection) -> None:
    dog = watchdog(folder)
    dog.enter("evaluate")
    time.sleep(1)
    enter(dog, "data", parent)
    re.match(r"(a+)+$", "a" * 60 + "b")


def callback_case(folder: Path, parent: Connection) -> None:
    module.CALLBACK_SECONDS = 0.5

    def told(hang: Hang) -> None:
        print(f"told {hang.section}", flush=True)
        time.sleep(60)

    dog = watchdog(folder)
    dog._on_hang = told
    enter(dog, "data", parent)
    time.sleep(60)


def full_disk_case(folder: Path, parent: Connection) -> None:
    dog = watchdog(folder)
    dog._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    dog._mark = Path("/proc/mark")  # cannot be written either
    enter(dog, "data", parent)
    time.sleep(60)


def collective_case(folder: Path, parent: Connection, rank: int, port: int) -> None:
    # That of the backend is a year here: a validation has no limit.
    timeout = process_group_timeout(HealthConfig(evaluate_seconds=0))
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timeout)
    dist.barrier()
    dog = watchdog(folder, rank)
    enter(dog, "data", parent)
    if rank == 1:
        time.sleep(60)
    dog.enter("backward")
    dist.all_reduce(torch.ones(1000))


def stopped_case(folder: Path, parent: Connection) -> None:
    module.LATE_SECONDS = 0.5
    dog = Watchdog(folder, 0, SHORT)
    for step in (1, 2):
        dog.start_step(step)
    enter(dog, "data", parent)
    parent.recv()  # after the stop, which took longer than the limit
    enter(dog, "backward", parent)
    time.sleep(60)


def in_child(case: Callable[..., None], folder: Path, parent: Connection, *arguments: int) -> None:
    """Run a case with its output in FOLDER/output."""
    with open(folder / "output", "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    case(folder, parent, *arguments)


@dataclass
class Child:
    """A process in a case, and how it ended: exit code, and seconds since it entered its section."""

    process: Any
    connection: Connection
    folder: Path
    code: int | None = None
    seconds: float = 0.0

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()


def start(case: Callable[..., None], folder: Path, *arguments: int) -> Child:
    connection, child_side = FORKS.Pipe()
    process = FORKS.Process(target=in_child, args=(case, folder, child_side, *arguments), daemon=True)
    process.start()
    return Child(process, connection, folder)


def end(children: list[Child]) -> None:
    """Wait for all, and see when each one ends."""
    running = {child.process.sentinel: child for child in children}
    last = time.monotonic() + 60
    try:
        while running and time.monotonic() < last:
            for sentinel in wait(list(running), timeout=1):
                child = running.pop(sentinel)  # type: ignore[call-overload]
                ended = time.monotonic()
                child.process.join()
                child.code = child.process.exitcode
                if child.connection.poll():
                    child.seconds = ended - child.connection.recv()
    finally:
        for child in running.values():
            child.process.kill()


CASES = (sleep_case, lock_case, lock_after_a_section_without_limit_case, callback_case, full_disk_case)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[Callable[..., None], list[Child]]:
    """The children of every case, all run at the same time."""
    port = free_port()
    children = {case: [start(case, tmp_path_factory.mktemp("hang"))] for case in CASES}
    shared = tmp_path_factory.mktemp("hang")
    children[collective_case] = [start(collective_case, shared, rank, port) for rank in range(2)]
    end([child for group in children.values() for child in group])
    return children


Ended = dict[Callable[..., None], list[Child]]


def test_a_section_that_takes_too_long_ends_the_process(ended: Ended) -> None:
    (child,) = ended[sleep_case]
    assert child.code == EXIT_HUNG and 1 <= child.seconds < 3
    (hang,) = read_hangs(child.folder)
    assert (hang.rank, hang.section, hang.step, hang.setting) == (0, "data", 7, "health.data_seconds")
    assert 1 <= hang.seconds < 2
    stacks = (child.folder / "hang-rank-0.txt").read_text()
    assert "in sleep_case" in stacks and "in _watch" in stacks
    sentence = f"rank 0 on {hang.host} hangs in data of step 7 for 1 s, longer than health.data_seconds=1"
    assert stacks.startswith(sentence)
    assert child.output == f"mmtrain: {sentence}; its stacks: {child.folder}/hang-rank-0.txt\n"


@pytest.mark.parametrize("case", [lock_case, lock_after_a_section_without_limit_case])
def test_a_call_that_keeps_the_global_lock_ends_the_process(case: Callable[..., None], ended: Ended) -> None:
    (child,) = ended[case]
    assert child.code == BACKSTOP_EXIT and 2 <= child.seconds < 3.5
    assert f"in {case.__name__}" in (child.folder / "hang-rank-0.txt").read_text()
    assert read_hangs(child.folder) == [Hang(0)]


def test_whoever_is_told_has_limited_time(ended: Ended) -> None:
    (child,) = ended[callback_case]
    assert child.code == EXIT_HUNG and 1.5 <= child.seconds < 3 and child.output.endswith("told data\n")


def test_a_full_disk_does_not_keep_it(ended: Ended) -> None:
    (child,) = ended[full_disk_case]
    assert child.code == EXIT_HUNG and child.seconds < 3 and "hangs in data of step 7" in child.output
    assert read_hangs(child.folder) == []


def test_a_collective_that_never_ends_is_told_apart_from_the_rank_that_it_waits_for(ended: Ended) -> None:
    children = ended[collective_case]
    assert [child.code for child in children] == [EXIT_HUNG, EXIT_HUNG]
    assert all(child.seconds < 3 for child in children)
    folder = children[0].folder
    host = read_hangs(folder)[0].host
    assert explain_hangs(read_hangs(folder), 2) == (
        f"rank 1 on {host} hangs in data of step 7 for 1 s; the others waited in backward of step 7 for 1 s"
    )
    assert "all_reduce" in (folder / "hang-rank-0.txt").read_text()


def test_a_process_that_was_stopped_does_not_hang(tmp_path: Path) -> None:
    child = start(stopped_case, tmp_path)
    try:
        child.connection.recv()
        os.kill(child.process.pid, signal.SIGSTOP)
        time.sleep(2)
        os.kill(child.process.pid, signal.SIGCONT)
        time.sleep(0.5)
        child.connection.send("go on")
        assert child.connection.poll(5)
    finally:
        end([child])
    assert child.code == EXIT_HUNG and child.seconds < 2.5
    (hang,) = read_hangs(tmp_path)
    assert hang.section == "backward" and hang.seconds < 2


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Hang]]:
    """The hangs that would have ended this process."""
    found: list[Hang] = []
    made: list[Watchdog] = []

    def fake(dog: Watchdog, armed: module.Armed, seconds: float) -> None:
        found.append(Hang(dog.rank, armed.section, "", dog.step, dog.entered, seconds, armed.limited_by))
        dog._closed.set()

    original = Watchdog.__init__
    monkeypatch.setattr(Watchdog, "__init__", lambda dog, *a, **k: (made.append(dog), original(dog, *a, **k))[1])
    monkeypatch.setattr(Watchdog, "_end", fake)
    yield found
    for dog in made:
        dog.close()


def test_the_first_step_belongs_to_setup(ends: list[Hang], tmp_path: Path) -> None:
    dog = Watchdog(tmp_path, 0, SHORT | {"setup": 1.0, "data": 0.1, "backward": 0.4})
    dog.start_step(1)
    dog.enter("data")
    time.sleep(0.6)
    assert not ends
    dog.start_step(2)
    dog.enter("backward")
    time.sleep(0.2)
    assert not ends
    time.sleep(0.5)
    assert [(hang.section, hang.setting, hang.step, hang.entered) for hang in ends] == [("backward", "backward", 2, 1)]


def test_setup_as_a_whole_has_a_limit(ends: list[Hang], tmp_path: Path) -> None:
    dog = Watchdog(tmp_path, 0, SHORT | {"setup": 0.6})
    dog.start_step(1)
    for _ in range(10):
        dog.enter("data")
        time.sleep(0.1)
    assert [(hang.section, hang.setting) for hang in ends] == [("data", "setup")]


def test_sections_in_time_without_limit_or_paused_go_on_for_ever(ends: list[Hang], tmp_path: Path) -> None:
    dog = watchdog(tmp_path, data=0.3)
    for _ in range(4):
        dog.enter("data")
        time.sleep(0.15)
    dog.enter("evaluate")
    time.sleep(0.7)
    dog.enter("data")
    dog.pause()
    time.sleep(0.7)
    with pytest.raises(KeyError):
        dog.enter("dat")
    dog.close()
    assert not ends and not list(tmp_path.iterdir())


def test_marks_of_an_earlier_start_are_put_away(tmp_path: Path) -> None:
    for rank in (0, 5):
        (tmp_path / f"hang-rank-{rank}.txt").write_text("stacks")
        (tmp_path / f"hang-rank-{rank}.json").write_text("{}")
    dog = Watchdog(tmp_path, 0, SHORT)
    assert read_hangs(tmp_path) == []
    dog.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hang-rank-0.old", "hang-rank-5.old"]


@pytest.mark.parametrize("mark", ["", "[]", "{", '{"rank": 1}', '{"rank": 0, "section": 3}', '{"x": 0}', "[" * 70000])
def test_damaged_marks_are_marks_without_a_place(mark: str, tmp_path: Path) -> None:
    (tmp_path / "hang-rank-0.txt").write_text("stacks")
    (tmp_path / "hang-rank-0.json").write_text(mark)
    assert read_hangs(tmp_path) == [Hang(0)]


def hang(rank: int, section: str = "backward", entered: int = 4, step: int = 9) -> Hang:
    return Hang(rank, section, "ab"[rank // 2], step, entered, 600.0, f"health.{section}_seconds")


LONG = "of step 9 for 600 s"
OTHERS = f"the others waited in backward {LONG}"


@pytest.mark.parametrize(
    ("hangs", "said"),
    [
        ([hang(0), hang(1), hang(2), hang(3, "data", 1)], f"rank 3 on b hangs in data {LONG}; {OTHERS}$"),
        ([hang(0), hang(1), hang(2), hang(3, "backward", 6)], f"rank 3 on b hangs in backward {LONG}; {OTHERS}$"),
        ([hang(0), hang(3, "data", 1)], f"rank 3 on b hangs in data {LONG}; ranks 1, 2 left no mark .*; {OTHERS}$"),
        ([hang(0), hang(1), hang(3)], f"rank 2 left no mark .*; {OTHERS}$"),
        ([hang(0), hang(1), Hang(2), hang(3)], f"rank 2 could not say where .*; {OTHERS}$"),
        ([hang(0)], f"ranks 1, 2, 3 left no mark .*; {OTHERS}$"),
        ([Hang(0)], "no rank could say"),
        ([hang(rank) for rank in range(4)], f"all 4 ranks hang in backward {LONG}: a collective"),
    ],
)
def test_the_rank_that_hangs_elsewhere_is_named(hangs: list[Hang], said: str) -> None:
    assert re.match(said, explain_hangs(hangs, 4))


def test_a_lone_rank_hangs_by_itself() -> None:
    assert explain_hangs([hang(0)], 1) == str(hang(0))


def test_the_backend_waits_longer_than_every_section() -> None:
    health = HealthConfig(checkpoint_seconds=5000.0)
    assert process_group_timeout(health).total_seconds() > max(section_limits(health).values()) == 5000.0
    assert process_group_timeout(HealthConfig(data_seconds=0)).days == 365


def test_every_section_has_a_setting_of_its_own_or_that_of_a_step() -> None:
    assert section_limits(HealthConfig()) == {
        "setup": 1800, "data": 600, "reduce": 600, "forward": 600, "backward": 600, "step": 600, "evaluate": 1800,
        "checkpoint": 1800,
    }  # fmt: skip

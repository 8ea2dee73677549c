"""Checkpoints as they are written: behind the training, complete or invisible, whatever fails or is killed."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from mmtrain.config import UserError, write_text_atomic
from mmtrain.train import checkpoint, saving
from mmtrain.train.checkpoint import fill, latest_checkpoint, newest, read_checkpoint, tensors_name
from mmtrain.train.distributed import World
from mmtrain.train.saving import Saver, write_tensors
from tests.conftest import cannot
from tests.train.small_checkpoint import (
    ALONE,
    ONE_FILE,
    SHAPES,
    STATE_BYTES,
    flip,
    fragments,
    holds,
    names,
    save,
)

Table = Callable[..., None]
FORK = multiprocessing.get_context("fork")
# Several ranks come from a process without threads: a fork of this one may inherit a lock that nobody will open.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["mmtrain.train.saving"])
Usage = namedtuple("Usage", "total used free")


def is_whole(folder: Path, step: int) -> bool:
    """Whether the newest checkpoint that verifies is this one, with the state of its step."""
    found, _ = latest_checkpoint(folder)
    held = fragments(0)
    if found is None:
        return False
    fill(found, held)
    return found.step == step and holds(held, step)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing waits until this is set."""
    event, write = threading.Event(), saving.write_tensors

    def held_back(*arguments: Any) -> dict[str, Any]:
        assert event.wait(20)
        return write(*arguments)

    monkeypatch.setattr(saving, "write_tensors", held_back)
    yield event
    event.set()


def test_training_goes_on_while_the_state_of_then_is_written(tmp_path: Path, gate: threading.Event) -> None:
    saver = Saver(tmp_path, ALONE, keep=1)
    for step in (5, 10):  # the second one uses the memory of the first
        gate.clear()
        state, counts = fragments(step), {"rows": step}
        saver.save(state, SHAPES, {"step": step, "counts": counts})
        counts["rows"] = 0
        for tensor in (tensor for fragment in state for tensor in fragment.tensors.values()):
            tensor.zero_()
        assert saver.poll() == [] and not (tmp_path / f"step-{step:08d}").exists()
        gate.set()
        assert saver.wait() is None and is_whole(tmp_path, step)
        (sentence,) = saver.poll()
        assert f"checkpoint step-{step:08d}: 0.0 MB in" in sentence and saver.poll() == []
        assert read_checkpoint(tmp_path / f"step-{step:08d}").state["counts"] == {"rows": step}


def test_one_is_in_flight_and_the_next_waits_for_it(tmp_path: Path, gate: threading.Event) -> None:
    saver = Saver(tmp_path, ALONE, keep=5)
    saver.save(fragments(5), SHAPES, {"step": 5})
    threading.Timer(0.3, gate.set).start()
    saver.save(fragments(10), SHAPES, {"step": 10})
    assert newest(tmp_path) is not None
    assert saver.wait() is None and is_whole(tmp_path, 10)
    assert any("training waited 0." in sentence for sentence in saver.poll())


def test_only_keep_remain_and_multiples_of_keep_every(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 25, 100):
        save(tmp_path, step, keep=2, keep_every=10)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (10, 15, 20, 25, 100)]
    assert newest(tmp_path).manifest["permanent"]


def test_a_damaged_newer_checkpoint_does_not_push_out_the_one_just_written(tmp_path: Path) -> None:
    save(tmp_path, 5)
    flip(save(tmp_path, 20) / ONE_FILE)
    save(tmp_path, 10, keep=1)
    found, complaints = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 10 and len(complaints) == 1
    save(tmp_path, 20, keep=1)  # and is replaced when training is there again
    assert is_whole(tmp_path, 20) and names(tmp_path) == ["step-00000020"]


def test_what_a_kill_left_is_cleared_away_and_nothing_else(tmp_path: Path) -> None:
    shutil.copytree(save(tmp_path, 5), tmp_path / ".step-00000010.deadbeef.partial")
    (tmp_path / ".step-00000007.removed").mkdir()
    (tmp_path / ".mine").mkdir()
    assert is_whole(tmp_path, 5)
    save(tmp_path, 10)
    assert names(tmp_path) == [".mine", "step-00000005", "step-00000010"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_write_is_said_every_time_and_never_fatal(asynchronous: bool, tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, 5)
    saver = Saver(tmp_path, ALONE, keep=1, asynchronous=asynchronous)

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(saving, "write_tensors", broken)
    for step in (10, 20):
        saver.save(fragments(step), SHAPES, {"step": step})
    failure = saver.wait()
    assert failure is not None and "step-00000020 could not be written: Input/output error" in failure
    first, second = saver.poll()
    assert "step-00000010" in first and first.endswith("(the newest there is: step-00000005); training goes on")
    assert second.endswith("training goes on, 2 times in a row now")
    assert names(tmp_path) == ["step-00000005"] and is_whole(tmp_path, 5)
    monkeypatch.setattr(saving, "write_tensors", write_tensors)
    saver.save(fragments(20), SHAPES, {"step": 20})
    assert saver.wait() is None and is_whole(tmp_path, 20)


def test_a_state_with_a_gap_is_not_a_checkpoint(tmp_path: Path) -> None:
    saver = Saver(tmp_path, ALONE, keep=1)
    saver.save(fragments(5)[1:], SHAPES, {"step": 5})
    assert "the pieces of parameter.embedding do not cover its shape [16, 8]" in (saver.wait() or "")
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match="two fragments of one parameter"):
        saver.save(fragments(5) + fragments(5), SHAPES, {"step": 5})


def test_the_file_is_the_one_that_the_library_writes(tmp_path: Path) -> None:
    tensors = {"parameter.a": torch.randn(5), "parameter.b": torch.randn(0), "exp_avg.a": torch.randn(10)[::2]}
    entry = write_tensors(tmp_path / "ours", tensors, {"starts": "{}"})
    assert checkpoint.file_fault(tmp_path, "ours", entry) is None
    found = load_file(tmp_path / "ours")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    save_file(found, tmp_path / "theirs", {"starts": "{}"})
    assert (tmp_path / "theirs").stat().st_size == entry["bytes"]
    for wrong in (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="not flat float32"):
            write_tensors(tmp_path / "wrong", {"parameter.a": wrong}, {})


def test_a_disk_that_is_too_small_is_a_sentence_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6 - STATE_BYTES, STATE_BYTES))
    saver = Saver(tmp_path, ALONE, keep=1)
    saver.save(fragments(5), SHAPES, {"step": 5})
    assert "it needs 0 MB and 0 MB are free; free some space" in (saver.wait() or "")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 pages; needs root."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True).returncode:
        cannot("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_fills_up_at_any_file_leaves_the_old_ones(tiny_disk: Path, monkeypatch, table: Table) -> None:
    folder, ballast = tiny_disk / "checkpoints", tiny_disk / "ballast"
    save(folder, 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 0, 2**40))  # as if others had filled it since
    sentences = []
    for free_pages in range(12):
        ballast.unlink(missing_ok=True)
        free = os.statvfs(tiny_disk).f_bavail
        with open(ballast, "wb") as file:
            file.write(bytes(4096 * (free - free_pages)))
        saver = Saver(folder, ALONE, keep=1)
        saver.save(fragments(10), SHAPES, {"step": 10, "long": "x" * 5000})
        failure = saver.wait()
        if failure is None:
            break
        sentences.append(failure)
        assert "No space left on device; free some space" in failure
        assert names(folder) == ["step-00000005"] and is_whole(folder, 5)
    assert len(sentences) == 4  # the tensors, their report, the second page of the state, the manifest
    assert is_whole(folder, 10) and names(folder) == ["step-00000010"]
    table("disk full at each file of a save", "said with the file; the checkpoint before it stays whole", "so at all 4")


@pytest.mark.parametrize("padding", [0, 20_000])
def test_a_file_that_may_not_grow_leaves_the_old_ones(padding: int, tmp_path: Path) -> None:
    save(tmp_path, 5)
    saver = Saver(tmp_path, ALONE, keep=1, asynchronous=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000 if padding else 1000, hard))  # the state; the tensors
    try:
        saver.save(fragments(10), SHAPES, {"step": 10, "long": "x" * padding})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in (saver.wait() or "")
    assert names(tmp_path) == ["step-00000005"] and is_whole(tmp_path, 5)


# Kill and power loss

FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "shutil.rmtree"}


def durable(file: Path | int) -> str:
    """A line of the log: which file, its size, and which files have which names in it where it is a folder."""
    found = os.stat(file)
    entries = {}
    if stat.S_ISDIR(found.st_mode):
        with os.scandir(file) as there:
            entries = {entry.name: entry.inode() for entry in there}
    return json.dumps({"inode": found.st_ino, "bytes": found.st_size, "names": entries})


def save_and_die(folder: Path, log: Path, event: int, num_bytes: int) -> None:
    """In a process of its own: save step 20 and be killed at a file operation or at a byte of a file (0: not).

    Every line of the log is what a power cut cannot take any more: a file with its size, a folder with its names.
    """
    descriptor, fsync, count = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.fsync, 0

    def strike() -> None:
        nonlocal count
        count += 1
        if count == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def noted(file: int) -> None:
        strike()
        fsync(file)
        os.write(descriptor, (durable(file) + "\n").encode())

    saver = Saver(folder, ALONE, keep=1)
    os.fsync = noted
    sys.addaudithook(lambda name, _: strike() if name in FILE_EVENTS else None)
    if num_bytes:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and gets an error
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    saver.save(fragments(20), SHAPES, {"step": 20})
    failure = saver.wait()
    os.write(descriptor, json.dumps({"count": count, "failure": failure}).encode())
    os._exit(0)


def cut_power(folder: Path, log: Path) -> None:
    """Take from a tree what was not flushed: bytes of files, names in folders."""
    flushed = {}
    for line in log.read_text().splitlines():
        record = json.loads(line)
        flushed[record.get("inode")] = record
    for path in sorted([folder, *folder.rglob("*")], reverse=True):
        record = flushed.get(path.stat().st_ino, {"bytes": 0, "names": {}})
        if path.is_file():
            os.truncate(path, min(record["bytes"], path.stat().st_size))
            continue
        for entry in list(path.iterdir()):
            if record["names"].get(entry.name) != entry.stat().st_ino:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def prepare(folder: Path, log: Path) -> None:
    """Steps 5 and 20, the latter unreadable, all of it flushed."""
    save(folder, 5)
    flip(save(folder, 20) / ONE_FILE)
    log.write_text("".join(durable(path) + "\n" for path in [folder, *folder.rglob("*")]))


def die(folder: Path, log: Path, event: int = 0, num_bytes: int = 0) -> int | None:
    process = FORK.Process(target=save_and_die, args=(folder, log, event, num_bytes))
    process.start()
    process.join(30)
    return process.exitcode


def test_killed_or_without_power_at_any_moment_of_a_save(tmp_path: Path, table: Table) -> None:
    prepare(tmp_path / "whole", tmp_path / "log")
    assert die(tmp_path / "whole", tmp_path / "log") == 0
    result = json.loads((tmp_path / "log").read_text().splitlines()[-1])
    assert result["failure"] is None and result["count"] > 30
    draw = random.Random(0)
    moments = [(event, 0) for event in sorted(draw.sample(range(1, result["count"] + 1), 26))]
    moments += [(0, num_bytes) for num_bytes in draw.sample(range(1, 2400), 4)]
    seen = set()
    for event, num_bytes in moments:
        folder, log = tmp_path / f"{event}-{num_bytes}", tmp_path / f"log-{event}-{num_bytes}"
        prepare(folder, log)
        assert die(folder, log, event, num_bytes) == (-signal.SIGKILL if event else -signal.SIGXFSZ)
        for loss in (False, True):
            if loss:
                cut_power(folder, log)
            found, _ = latest_checkpoint(folder)
            assert found is not None and is_whole(folder, found.step), (event, num_bytes, loss)
            assert {path.name for path in folder.glob("[!.]*")} <= {"step-00000005", "step-00000020"}
            seen.add((found.step, loss))
        save(folder, 20, keep=1)
        assert is_whole(folder, 20) and names(folder) == ["step-00000020"]
    assert seen == {(5, False), (20, False), (5, True), (20, True)}
    fault, whole = f"at {len(moments)} random file operations and bytes of a save", "a whole checkpoint is found"
    table(f"kill -9 {fault}", f"{whole}, the next save works", "so")
    table(f"power loss {fault}, what was not flushed is gone", f"{whole}, the next save works", "so")


# Several ranks


def rank_main(function: Callable[..., Any], folder: Path, rank: int, size: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{size}", rank=rank, world_size=size)
    results.put((rank, function(World(rank, size, torch.device("cpu")), folder / "checkpoints")))
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(size: int, folder: Path, function: Callable[[World, Path], Any]) -> list[Any]:
    """What a function returns on each rank, in processes that talk by gloo."""
    results = SERVER.SimpleQueue()
    processes = [SERVER.Process(target=rank_main, args=(function, folder, r, size, results)) for r in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * size
    return [result for _, result in sorted((results.get() for _ in range(size)), key=lambda pair: pair[0])]


def save_on(world: World, folder: Path, step: int, **settings: Any) -> tuple[str | None, list[str]]:
    saver = Saver(folder, world, keep=2, **settings)
    saver.save(fragments(step, world.rank, world.size), SHAPES, {"step": step})
    return saver.wait(), saver.poll()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_rank_writes_its_share_and_all_of_it_is_one_checkpoint(size: int, tmp_path: Path) -> None:
    results = on_ranks(size, tmp_path, partial(save_on, step=5))
    assert [failure for failure, _ in results] == [None] * size
    assert [len(sentences) for _, sentences in results] == [1] + [0] * (size - 1)
    path = tmp_path / "checkpoints" / "step-00000005"
    for rank in range(size):
        tensors = load_file(path / tensors_name(rank, size))
        assert sum(tensor.nbytes for tensor in tensors.values()) == STATE_BYTES // size
    assert names(path) == sorted(["MANIFEST.json", "state.json", *(tensors_name(r, size) for r in range(size))])
    assert is_whole(tmp_path / "checkpoints", 5)


def faults_on_two_ranks(world: World, folder: Path) -> list[Any]:
    def broken(path: Path, *_: object) -> Any:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def report(path: Path, text: str) -> None:
        nonlocal attempts
        attempts += "failure" in text
        if "failure" in text and (attempts < 3 or path.with_suffix("").exists()):  # its own file takes the room
            raise OSError(28, "No space left on device")
        write_text_atomic(path, text)

    def dumb(path: Path, *_: object) -> Any:
        threading.Event().wait()

    seen: list[Any] = [save_on(world, folder, 5)[0]]
    attempts = 0
    saving.write_text_atomic = report
    for write, patience in ((broken, 5), (dumb, 0.3)):
        saving.write_tensors = write if world.rank == 1 else write_tensors
        saver = Saver(folder, world, keep=1, patience_seconds=patience)
        saver.save(fragments(10, world.rank, 2), SHAPES, {"step": 10})
        if write is dumb and world.rank == 1:
            saver._thread = None  # it never ends
        seen.append(saver.wait())
    saving.write_tensors = write_tensors
    saving.VISIBLE_WITHIN_SECONDS = 0.1
    elsewhere = folder if world.rank == 0 else folder.with_name("elsewhere")
    seen.append(save_on(world, elsewhere, 10)[0])
    free = saving.shutil.disk_usage
    saving.shutil.disk_usage = lambda _: Usage(10**6, 0, STATE_BYTES * 3 // 4)  # room for one rank's share
    seen.append(save_on(world, folder, 10)[0])
    saving.shutil.disk_usage = free
    seen.append(sorted(os.listdir(folder)))
    return [*seen, save_on(world, folder, 10)[0]]


def test_the_fault_of_one_rank_is_told_by_the_first_and_the_old_ones_stay(tmp_path: Path) -> None:
    first, second = on_ranks(2, tmp_path, faults_on_two_ranks)
    assert first == second
    whole, full, dumb, blind, small, there, again = first
    assert whole is None and again is None and there == ["step-00000005"]
    assert "No space left on device; free some space, or move root= (rank 1)" in full
    assert "rank 1 has not written its file after 0 s" in dumb
    assert "rank 1 does not see" in blind and "a file system that all hosts share" in blind
    assert "it needs" in small
    assert is_whole(tmp_path / "checkpoints", 10)


def read_on_two_ranks(world: World, folder: Path) -> Any:
    hashed = []
    digest = checkpoint.hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        hashed.append(Path(file.name).name)
        return digest(file, name)

    checkpoint.hashlib.file_digest = counted
    try:
        found, complaints = latest_checkpoint(folder, world)
    except UserError as error:
        return str(error), hashed
    return (found and found.step, complaints), hashed


def save_twice(world: World, folder: Path) -> None:
    for step in (5, 10):
        save_on(world, folder, step)


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_ranks_share_the_hashing_and_get_the_same_answer(damaged: int, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    on_ranks(2, tmp_path, save_twice)
    (tmp_path / "store-2").unlink(missing_ok=True)
    for step in (10, 5)[:damaged]:
        flip(folder / f"step-{step:08d}" / tensors_name(1, 2))
    (first, left), (second, right) = on_ranks(2, tmp_path, read_on_two_ranks)
    assert first == second
    if damaged == 2:
        assert "no checkpoint under" in first
    else:
        assert first[0] == (5 if damaged else 10) and len(first[1]) == damaged
    assert sorted(left[:2] + right[:1]) == ["state.json", tensors_name(0, 2), tensors_name(1, 2)]

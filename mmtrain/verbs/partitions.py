"""Independent pieces of work in several processes, or on Ray; what is done stays done when the program is killed."""

import errno
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path
from typing import Any

import torch

from mmtrain.config import UserError, write_text_atomic
from mmtrain.verbs.partitions_ray import run_on_ray
from mmtrain.verbs.progress import Bar

Task = dict[str, Any]
Result = dict[str, Any]
Work = Callable[[Task], Result]
"""Called in any process, once or again after a crash, always with the same outcome; its files are whole, or written
anew. Task and result are plain JSON values; result["documents"] is how many documents it was about. An attribute
`uses_gpu` that is true asks Ray for a share of a GPU."""

# Faults of the disk that the command line knows a sentence for.
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def run_partitions(
    work: Work,
    tasks: Sequence[Task],
    done: Path | None,
    label: str,
    processes: int,
    limit: int = 0,
    runner: str = "processes",
) -> list[Result]:
    """The results of `work` for each of `tasks`, in their order, from `processes` processes (0: one per core).

    runner: "processes" of this machine, or "ray" (`partitions_ray`); the results are the same.
    done: a folder that keeps each result, and so tells the next call what not to do again (None: nothing is kept).
    limit: only the first tasks whose documents add up to so many (0: all); no later one is started after that.
    Every process computes with one thread, so that results do not depend on their number.
    Raises UserError where `work` does, when it fails in another way, and when a process is killed (on Ray: when the
    process of one partition is killed time and again).
    """
    results = _kept(done, len(tasks)) if done else {}
    if results:
        print(f"  {label}: {len(results)} of {len(tasks)} partitions were done before", flush=True)

    def prefix() -> list[Result]:
        """The results up to the limit, as far as they are there."""
        found: list[Result] = []
        documents = 0
        while len(found) in results and not (limit and documents >= limit):
            found.append(results[len(found)])
            documents += found[-1]["documents"]
        return found

    def is_enough() -> bool:
        return bool(limit) and sum(result["documents"] for result in prefix()) >= limit

    def missing() -> Iterator[int]:
        for number in range(len(tasks)):
            if is_enough():
                return
            if number not in results:
                yield number

    num_missing = len(tasks) - len(results)
    num_workers = min(processes or available_cores(), num_missing)
    run = partial(_in_processes, num_workers) if num_workers > 1 else _here
    if runner == "ray" and num_missing:
        run = partial(run_on_ray, processes, num_workers, getattr(work, "uses_gpu", False))
    with Bar(label, len(tasks)) as advance:
        for number, result in run(partial(_run, work), tasks, missing()):
            results[number] = result
            if done:
                write_text_atomic(done / f"{number:06d}.json", json.dumps(result))
            advance(len(results), note=f"{sum(result['documents'] for result in results.values()):,} documents")
    return prefix()


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _kept(done: Path, num_tasks: int) -> dict[int, Result]:
    done.mkdir(parents=True, exist_ok=True)
    paths = {number: done / f"{number:06d}.json" for number in range(num_tasks)}
    return {number: json.loads(path.read_text()) for number, path in paths.items() if path.is_file()}


def _run(work: Work, task: Task) -> Result:
    """`work`, whose every failure becomes one sentence that names the task."""
    try:
        return work(task)
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            raise
        raise UserError(
            f"{type(error).__name__} ({error}) in the partition {json.dumps(task)[:300]}; MMTRAIN_DEBUG=1 shows where"
        ) from error


def _here(work: Work, tasks: Sequence[Task], numbers: Iterator[int]) -> Iterator[tuple[int, Result]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in numbers:
            yield number, work(tasks[number])
    finally:
        torch.set_num_threads(threads)


def _in_processes(
    num_workers: int, work: Work, tasks: Sequence[Task], numbers: Iterator[int]
) -> Iterator[tuple[int, Result]]:
    """Results as they come. When anything fails here, the processes are ended at once."""
    running: dict[Future[Result], int] = {}
    # Not forked from here, CUDA and threads would not survive it; from a server that has imported what is slow.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mmtrain.verbs.build", "mmtrain.verbs.tokenize"])
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(num_workers, context, initializer=_start_process) as pool:
        try:
            while True:
                while len(running) < num_workers and (number := next(numbers, None)) is not None:
                    running[pool.submit(work, tasks[number])] = number
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process was killed from outside, most likely for want of memory; run the same command again, "
                f"with fewer than data.processes={num_workers}: it goes on where it stopped"
            ) from error
        except BaseException:
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            raise


def _start_process() -> None:
    """One thread of computing; Ctrl-C is the parent's to handle; no process outlives the parent, however it ends."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for_end([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

"""Independent pieces of work in several processes, or on a Ray cluster; what is done stays done after a kill."""

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
from mmtrain.verbs.progress import Bar

Task = dict[str, Any]
Result = dict[str, Any]
Work = Callable[[Task], Result]
"""Called in any process, once or again after a crash, always with the same outcome; its files are whole, or written
anew. Task and result are plain JSON values; result["documents"] is how many documents it was about."""

RETRIES = 3  # of a task of Ray whose worker was killed
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

    done: a folder that keeps each result, and so tells the next call what not to do again (None: nothing is kept).
    limit: only the first tasks whose documents add up to so many (0: all); no later one is started after that.
    Every process computes with one thread, so that results do not depend on their number.
    runner: processes, of this machine; or ray: of the cluster at RAY_ADDRESS, or of one that is started here. What a
    task reads and writes must then be on a file system that all machines share.
    Raises UserError where `work` does, when it fails in another way, and when a process is killed.
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

    num_workers = min(processes or available_cores(), len(tasks) - len(results))
    run = partial(_in_processes, num_workers) if num_workers > 1 else _here
    if runner == "ray" and num_workers:
        run = partial(_on_ray, num_workers)
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


def _on_ray(
    num_workers: int, work: Work, tasks: Sequence[Task], numbers: Iterator[int]
) -> Iterator[tuple[int, Result]]:
    """Results as they come. Ray itself starts a task again whose worker was killed, up to `RETRIES` times."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError("runner=ray needs the package ray: pip install 'mmtrain[ray]'") from error

    address = os.environ.get("RAY_ADDRESS")
    try:
        if not ray.is_initialized():  # it starts once and ends with the program
            ray.init(
                address=address or "local",  # without it, what a killed program left behind would be joined
                num_cpus=None if address else available_cores(),
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level="ERROR",
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"Ray does not start at {address or 'this machine'} ({error}); see `ray status`") from error
    resources = ray.cluster_resources()
    cores = max(1, int(resources.get("CPU", 1)))
    at_once = cores if address else min(cores, num_workers)
    share = min(1.0, resources.get("GPU", 0.0) / cores)
    task = ray.remote(num_cpus=1, num_gpus=share, max_retries=RETRIES)(_run_alone)
    running: dict[Any, int] = {}
    try:
        while True:
            while len(running) < at_once and (number := next(numbers, None)) is not None:
                running[task.remote(work, tasks[number])] = number
            if not running:
                return
            for reference in ray.wait(list(running))[0]:
                yield running.pop(reference), ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise UserError(
            f"Ray lost a worker more than {RETRIES} times ({type(error).__name__}), most likely for want of memory; "
            "run the same command again: it goes on where it stopped"
        ) from error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _run_alone(work: Work, task: Task) -> Result:
    torch.set_num_threads(1)
    return work(task)


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

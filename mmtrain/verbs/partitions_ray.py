"""Partitions on Ray: of a cluster (RAY_ADDRESS), or of a Ray of this machine that lives as long as the call.

A partition is a Ray task of one core, and of a share of a GPU where its work uses one and there are any. Tasks, results
and messages travel through Ray; everything else through files, so that all hosts must see the same folders.
"""

import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import floor
from pathlib import Path
from typing import Any

import torch

from mmtrain.config import UserError

MOST_RETRIES = 3  # of a partition whose worker is killed; a partition that needs too much memory must end some time
QUEUED_PER_CORE = 2  # so that no core waits for this process; what is queued also makes an autoscaler add hosts
STORE_BYTES = 100 << 20  # of a local Ray, in shared memory; results are small, this is about the least that Ray allows


def run_on_ray(
    processes: int,
    cores: int,
    uses_gpu: bool,
    work: Callable[[dict[str, Any]], dict[str, Any]],
    tasks: Sequence[dict[str, Any]],
    numbers: Iterator[int],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Results of the tasks of these numbers as they come, at most `processes` at a time (0: as many as there is room).

    cores: CPUs of the local Ray, where there is no cluster. uses_gpu: a task needs a share of a GPU, if there are any.
    What is killed together with its worker or its host is done again, up to three times each. When anything fails here,
    all tasks are ended at once.
    Raises UserError where `work` does, without Ray, without a cluster at RAY_ADDRESS, and for a partition whose worker
    is killed time and again.
    """
    with _connected(cores) as ray:
        run = ray.remote(_run_here).options(num_cpus=1, num_gpus=_gpu_share(ray) if uses_gpu else 0, max_retries=0)
        shared_work = ray.put(work)
        place = str(Path.cwd())
        running: dict[Any, int] = {}
        killed: Counter[int] = Counter()

        def start(number: int) -> None:
            running[run.remote(shared_work, tasks[number], place)] = number

        try:
            while True:
                room = processes or QUEUED_PER_CORE * max(int(ray.cluster_resources().get("CPU", 1)), 1)
                while len(running) < room and (number := next(numbers, None)) is not None:
                    start(number)
                if not running:
                    break
                for reference in ray.wait(list(running), num_returns=1)[0]:
                    number = running.pop(reference)
                    try:
                        result = ray.get(reference)
                    except ray.exceptions.RayTaskError as error:
                        if isinstance(error.cause, (UserError, OSError)):
                            raise error.cause from None
                        raise UserError(
                            f"{_last_line(error)} on a host of Ray, before the partition began; every host needs the "
                            f"same Python {sys.version_info[0]}.{sys.version_info[1]} and mmtrain as this one"
                        ) from error
                    except ray.exceptions.RayError as error:
                        killed[number] += 1
                        if killed[number] > MOST_RETRIES:
                            raise UserError(
                                f"the worker of partition {number} was killed {killed[number]} times "
                                f"({type(error).__name__}), most likely for want of memory; run the same command again "
                                "with a smaller data.processes or on larger hosts: it goes on where it stopped"
                            ) from error
                        print(f"  a worker was killed ({type(error).__name__}): partition {number} again", flush=True)
                        start(number)
                    else:
                        yield number, result
        except BaseException:
            for reference in running:
                ray.cancel(reference, force=True)
            raise
        if killed:
            print(f"  {killed.total()} partitions were done again after their workers were killed", flush=True)


@contextmanager
def _connected(cores: int) -> Iterator[Any]:
    """The package ray, connected: to the Ray that this program is connected to, that of RAY_ADDRESS, or a new one.

    The last one ends with this process, however that ends (agents of Ray's own follow within a minute).
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UserError(
            "runner=ray needs the package ray; pip install 'mmtrain[ray]', or use runner=processes"
        ) from error
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init("local", num_cpus=cores, include_dashboard=False, object_store_memory=STORE_BYTES, **quiet)
    except Exception as error:  # Ray raises many types here
        where = f"no Ray answers at RAY_ADDRESS={address}" if address else "Ray does not start on this machine"
        raise UserError(f"{where} ({_last_line(error)}); mend that, or use runner=processes") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _gpu_share(ray: Any) -> float:
    """Of a GPU per task: as much as lets every core of the hosts with GPUs have a task; 0 without a GPU."""
    hosts = [host["Resources"] for host in ray.nodes() if host["Alive"] and host["Resources"].get("GPU")]
    gpus, cores = (sum(host.get(kind, 0) for host in hosts) for kind in ("GPU", "CPU"))
    return min(1.0, floor(1e4 * gpus / max(cores, 1)) / 1e4) if gpus else 0.0  # Ray counts ten-thousandths


def _run_here(work: Callable[[dict[str, Any]], dict[str, Any]], task: dict[str, Any], place: str) -> dict[str, Any]:
    """In a worker of Ray: where relative paths mean what they mean to the command, and with one thread."""
    try:
        os.chdir(place)
    except OSError as error:
        raise UserError(
            f"a host of Ray has no folder {place} ({error.strerror}); run the command in a folder that all hosts share"
        ) from error
    torch.set_num_threads(1)
    return work(task)


def _last_line(error: BaseException) -> str:
    """What an error of Ray says, without its traceback and its colors."""
    error = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:200]}" if lines else type(error).__name__

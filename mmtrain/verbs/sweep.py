"""`mmtrain train -m`: a run for each combination of settings, each by its own `mmtrain train`, in one folder.

SWEEP/
    sweep.json     the jobs with their settings, state, exit code and reason
    JOB/           a run directory as any other; logs/sweep.log is what its commands said
"""

import contextlib
import fcntl
import json
import os
import shlex
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmtrain.config import Config, UserError, write_text_atomic
from mmtrain.config.compose import with_overrides
from mmtrain.config.search import with_name
from mmtrain.config.sweep import Job, Sweep, expand, read_key
from mmtrain.flops import Ledger
from mmtrain.track import closing_box, read_metrics, redact
from mmtrain.track.console import duration
from mmtrain.train.launch import check_batch, num_ranks
from mmtrain.train.run import check_run
from mmtrain.train.stop import StopSignals
from mmtrain.train.supervise import FINISHED
from mmtrain.verbs.partitions import available_cores
from mmtrain.verbs.sweep_job import FAILED, LOG, RUNNING, WAITING, Entry, Running, start

SWEEP = "sweep.json"
SEARCH = "search.json"  # of a search, in the same place
POLL_SECONDS = 0.2


def main(argv: list[str]) -> int:
    """`mmtrain sweep`: a search; with `wandb` or `ladder` as the first word that."""
    from mmtrain.verbs import search, sweep_wandb, train  # noqa: PLC0415 - they need this module

    if argv[:1] == ["ladder"]:
        return train.main(["-m", *with_name(argv[1:], "ladder")])

    return sweep_wandb.main(argv[1:]) if argv[:1] == ["wandb"] else search.main(argv)


def grid(argv: list[str]) -> int:
    """Check all jobs, run those that are missing; 1 when one failed, now or before."""
    sweep = expand(argv)
    settings = sweep.settings.sweep
    places = places_of(sweep.jobs, settings.parallel)
    check_jobs(sweep, places)
    with claimed(sweep.folder):
        entries = open_entries(sweep, settings.retry_failed)
        command = redact(shlex.join(["mmtrain", "train", "-m", *argv]))
        was_stopped = run_jobs(sweep, entries, places, command)
    print_table(sweep.settings.name, entries)
    return conclude(sweep.folder, entries, was_stopped)


def one_job(argv: list[str]) -> Job | None:
    """The job of a grid that sweep.job chooses, None without it; raises UserError when the grid has no such job."""
    if not any(read_key(word) == "sweep.job" for word in argv):
        return None
    sweep = expand(argv)
    number, last = sweep.settings.sweep.job, len(sweep.jobs) - 1
    if number is not None and not 0 <= number <= last:
        raise UserError(f"sweep.job={number} is not in this grid of {last + 1} jobs; give a number from 0 to {last}")
    return None if number is None else sweep.jobs[number]


def places_of(jobs: tuple[Job, ...], parallel: int) -> list[dict[str, str]]:
    """The environment for each of the jobs that run side by side; parallel 0: as many as this machine carries."""
    import torch  # noqa: PLC0415

    gpus = visible_gpus(torch.cuda.device_count())
    cores, ranks = available_cores(), max(job.config.engine.ranks for job in jobs)
    if not parallel:
        ranks = ranks or (1 if gpus else min(2, cores))
        parallel = max(1, (len(gpus) or cores) // ranks)
    parallel = min(parallel, len(jobs))
    if parallel == 1:
        return [{}]
    ranks = ranks or max(1, len(gpus) // parallel if gpus else min(2, cores))
    places = []
    for number in range(parallel):
        environment = {}
        if "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, cores // (parallel * ranks)))
        if gpus:  # more jobs than there are GPUs for share them
            mine = [gpus[(number * ranks + rank) % len(gpus)] for rank in range(ranks)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(mine))
        places.append(environment)
    return places


def visible_gpus(count: int) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    chosen = [device.strip() for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()]
    return chosen[:count] if chosen else [str(number) for number in range(count)]


def check_jobs(sweep: Sweep, places: list[dict[str, str]]) -> None:
    """Raise UserError for what would make a job fail at its start, before any job is started."""
    for job in sweep.jobs:
        check_ranks(job, places)
        try:
            check_run(sweep.folder / job.name, job.config)
        except UserError as error:
            raise UserError(f"job {job.name}: {error}") from error
    for task in sweep.settings.sweep.evaluate:
        with_overrides(sweep.jobs[0].config, [f"task={task}"])


def check_ranks(job: Job, places: list[dict[str, str]]) -> None:
    """Raise UserError for a job whose ranks do not fit the others, or its batch."""
    engine, devices = job.config.engine, places[0].get("CUDA_VISIBLE_DEVICES")
    if len(places) > 1 and (engine.hostfile or engine.master_port):
        key = "hostfile" if engine.hostfile else "master_port"
        raise UserError(f"engine.{key} is for one job at a time; set sweep.parallel=1, or leave it out")
    try:
        check_batch(job.config, engine.ranks or (len(devices.split(",")) if devices else num_ranks(job.config)))
    except UserError as error:
        raise UserError(f"job {job.name}: {error}") from error


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock the sweep; raises UserError when another process runs it, or when the folder is a run's."""
    for name, what in (("config.yaml", "directory of one run"), (SEARCH, "folder of a search")):
        if (folder / name).exists():
            raise UserError(f"{folder} is the {what}, not of a grid; choose another name=")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process runs the sweep {folder}; wait for it, or choose another name=") from error
        yield


def open_entries(sweep: Sweep, retry_failed: bool) -> list[Entry]:
    """An entry per job, as an earlier command left it. Raises UserError where that was another sweep."""
    entries = [Entry(job.name, list(job.choices), str(sweep.folder / job.name)) for job in sweep.jobs]
    file = sweep.folder / SWEEP
    if not file.is_file():
        return entries
    try:
        before = {row["name"]: Entry(**row) for row in json.loads(file.read_text(encoding="utf-8"))["jobs"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); delete it: what is finished is found again") from error
    for entry in entries:
        old = before.pop(entry.name, None)
        if old is None or old.overrides != entry.overrides:
            raise _another(sweep.folder, f"no {entry.name}" if old is None else f"{entry.name} as {old.overrides}")
        again = old.state == RUNNING or (old.state == FAILED and retry_failed)
        entry.state, entry.seconds = WAITING if again else old.state, old.seconds
        if entry.state == FAILED:
            entry.exit_code, entry.reason = old.exit_code, old.reason
    if before:
        raise _another(sweep.folder, next(iter(before)))
    return entries


def _another(folder: Path, what: str) -> UserError:
    return UserError(
        f"{folder} holds another sweep (it has {what}, this command has not); say the same axes, or choose another "
        "name="
    )


def save(folder: Path, command: str, entries: list[Entry]) -> None:
    """Replace sweep.json."""
    content = {"command": command, "jobs": [asdict(entry) for entry in entries]}
    write_text_atomic(folder / SWEEP, json.dumps(content, indent=1) + "\n")


def run_jobs(sweep: Sweep, entries: list[Entry], places: list[dict[str, str]], command: str) -> bool:
    """Run the jobs that wait, as many at a time as there are places; True when somebody asked to stop."""
    waiting = [(job, entry) for job, entry in zip(sweep.jobs, entries, strict=True) if entry.state == WAITING]
    total, free = len(entries), list(enumerate(places))
    running: dict[int, Running] = {}
    save(sweep.folder, command, entries)
    with StopSignals("stopping: every job finishes its step and saves", "the same command goes on") as stop:
        try:
            asked = False
            while running or (waiting and not stop.asked):
                while waiting and free and not stop.asked:
                    number, environment = free.pop(0)
                    job, entry = waiting.pop(0)
                    begun = _start(job, entry, sweep.settings, environment)
                    if begun is None:
                        waiting.append((job, entry))
                        free.append((number, environment))
                        break
                    running[number] = begun
                    save(sweep.folder, command, entries)
                if stop.asked and not asked:
                    asked = True
                    for one in running.values():
                        one.terminate()
                for number, one in list(running.items()):
                    if one.poll(stop.asked):
                        free.append((number, places[number]))
                        del running[number]
                        save(sweep.folder, command, entries)
                        done = sum(entry.state in (FINISHED, FAILED) for entry in entries)
                        print(f"{done} of {total}  {said(one.entry)}", flush=True)
                time.sleep(POLL_SECONDS)
            return stop.asked
        finally:
            for one in running.values():
                one.end_at_once()
            save(sweep.folder, command, entries)


def _start(job: Job, entry: Entry, settings: Config, environment: dict[str, str]) -> Running | None:
    begun = start(job, entry, settings.sweep.evaluate, environment)
    if begun is not None:
        print(f"{entry.name}: started; its output is in {os.path.relpath(begun.log)}", flush=True)
    return begun


def said(entry: Entry) -> str:
    """One line about a job that has ended."""
    line = f"{entry.name}: {'stopped' if entry.state == WAITING else entry.state} after {duration(entry.seconds)}"
    loss = last_validation(entry.folder)
    if entry.state == FINISHED and loss is not None:
        return f"{line}, val_loss {loss:.4f}"
    return f"{line}: {entry.reason} ({os.path.relpath(entry.folder / LOG)})" if entry.reason else line


def last_validation(run: Path) -> float | None:
    """The last validation loss of a run."""
    losses = [row["val_loss"] for row in read_metrics(run / "metrics.jsonl") if row.get("val_loss") is not None]
    return losses[-1] if losses else None


def print_table(name: str, entries: list[Entry]) -> None:
    """What became of every job."""
    table = Table("job", "state", "steps", "val_loss", "train FLOPs", "minutes", title=name, title_justify="left")
    for entry in entries:
        rows = read_metrics(entry.folder / "metrics.jsonl")
        loss, flops = last_validation(entry.folder), ""
        with contextlib.suppress(UserError):  # none yet, or what the job failed for
            flops = f"{Ledger.read(entry.folder / 'ledger.json').training_total:.3e}"
        table.add_row(
            entry.name,
            entry.state,
            str(rows[-1]["step"]) if rows else "",
            "" if loss is None else f"{loss:.4f}",
            flops,
            f"{entry.seconds / 60:.1f}",
        )
    Console().print(table)


def conclude(folder: Path, entries: list[Entry], was_stopped: bool) -> int:
    """Say where everything is and what to do next; returns the exit code."""
    states = Counter(entry.state for entry in entries)
    failed = [entry for entry in entries if entry.state == FAILED]
    place = os.path.relpath(folder)
    places = {"jobs": os.path.relpath(folder / SWEEP), "runs": f"{place}/JOB"}
    places |= {f"failed: {entry.name}": f"{entry.reason} ({os.path.relpath(entry.folder / LOG)})" for entry in failed}
    if states[WAITING]:
        places["next"] = "the same command goes on with those that wait"
    elif failed:
        places["next"] = "the same command with sweep.retry_failed=true starts the failed ones again"
    else:
        places["next"] = f"mmtrain report run={place}/JOB"
    title = ", ".join(f"{count} {state}" for state, count in states.items())
    closing_box(f"{folder.name}: {'stopped; ' if was_stopped else ''}{title}", places)
    return 1 if failed else 0

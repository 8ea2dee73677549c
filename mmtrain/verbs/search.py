"""`mmtrain sweep`: a search over settings, its trials chosen and pruned by optuna, each by its own `mmtrain train`.

SEARCH/
    study.db              optuna's record of the trials (or sweep.storage=URL)
    search.json           the trials with their settings, state, loss and FLOPs, and the books of all together
    experiment/best.yaml  the best trial as an experiment
    trial-NNNN/           a run directory as any other; logs/sweep.log is what its commands said

The study is the truth. A trial that nobody works on any more (its worker was stopped or killed) is still running there;
the next worker goes on with it, in the same run directory. A lock file in that directory says who works on it.
"""

import contextlib
import fcntl
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtrain.config import UserError, fingerprint
from mmtrain.config.compose import load_frozen, with_overrides
from mmtrain.config.search import Search, plan_search
from mmtrain.config.sweep import Job
from mmtrain.track import redact
from mmtrain.track.metrics import read_rows
from mmtrain.train.run import check_run
from mmtrain.train.stop import StopSignals
from mmtrain.train.supervise import FINISHED
from mmtrain.verbs.search_record import FLOPS, PRUNED_AT, REASON, flops_of, print_search, write_record
from mmtrain.verbs.study import open_study, sampler_for, suggest
from mmtrain.verbs.sweep import SWEEP, check_ranks, places_of
from mmtrain.verbs.sweep_job import FAILED, Entry, Running, start

OWNER = ".search.lock"
POLL_SECONDS = 0.05
MOST_FAILURES = 3
"""The search ends when so many trials have failed and none has come to a loss."""


@dataclass
class Trial:
    """A trial that this process works on."""

    trial: Any
    """optuna's."""
    job: Job
    owner: int
    """Descriptor of the lock on it."""
    entry: Entry
    running: Running | None = None
    """None before its process starts."""
    place: int = 0
    """In metrics.jsonl, up to which it has been read."""
    losses: dict[int, float] = field(default_factory=dict)
    """What optuna knows: share of the steps in percent -> validation loss."""
    pruned_at: int | None = None
    """The share at which it was told to end."""
    steps: int = 0
    """Those that it is to train; 0 until its directory says so."""
    is_asked: bool = False
    """Whether it was asked to end; a second time would end it at once, without saving."""

    def ask_to_end(self) -> None:
        """Let it finish its step and save."""
        if self.running and not self.is_asked:
            self.running.terminate()
            self.is_asked = True


def main(argv: list[str]) -> int:
    """Run trials until there are sweep.trials; 1 when one failed."""
    search, tried = plan_search(argv)
    settings = search.settings.sweep
    for task in settings.evaluate:
        with_overrides(tried[0].config, [f"task={task}"])
    places = places_of(tuple(tried[:1]) * settings.trials, settings.parallel)
    for job in tried:
        check_ranks(job, places)
    _check_folder(search.folder)
    with _locked(search.folder):
        study = open_study(search)
    worker = Worker(search, study, redact(shlex.join(["mmtrain", "sweep", *argv])))
    worker.write()
    was_stopped = worker.run(places)
    return print_search(search, study, was_stopped)


def _check_folder(folder: Path) -> None:
    """Raise UserError when `folder` is a run's or a grid's; what a search is about is in its study."""
    for name, what in (("config.yaml", "the directory of one run"), (SWEEP, "the folder of a grid")):
        if (folder / name).exists():
            raise UserError(f"{folder} is {what}, not of a search; choose another name=")
    folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One worker at a time; held for moments only."""
    with open(folder / ".search.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Worker:
    """Takes trials of a study one after the other, as many at a time as there are places."""

    def __init__(self, search: Search, study: Any, command: str) -> None:
        self.search, self.study, self.command = search, study, command
        self._left: set[int] = set()
        """Trials that somebody else stopped: for the next start of the command."""

    def run(self, places: list[dict[str, str]]) -> bool:
        """Work until there is no more to do; True when somebody asked to stop."""
        free, working = list(range(len(places))), dict[int, Trial]()
        with StopSignals("stopping: every trial finishes its step and saves", "the same command goes on") as stop:
            try:
                while True:
                    while free and not stop.asked and (taken := self.take()):
                        working[free.pop(0)] = taken
                    if not working:
                        return stop.asked
                    for number, one in list(working.items()):
                        if stop.asked:
                            one.ask_to_end()
                        if self.advance(one, places[number], stop.asked):
                            free.append(number)
                            del working[number]
                    time.sleep(POLL_SECONDS)
            finally:
                for one in working.values():
                    if one.running:
                        one.running.end_at_once()
                    os.close(one.owner)

    def take(self) -> Trial | None:
        """A trial that nobody works on, or a new one; None when there are enough."""
        import optuna  # noqa: PLC0415

        with _locked(self.search.folder):
            trials = self.study.get_trials(deepcopy=False)
            states = [trial.state.name for trial in trials]
            if "COMPLETE" not in states and states.count("FAIL") >= MOST_FAILURES:
                raise UserError(
                    f"{states.count('FAIL')} trials failed and none came to a loss: {_reason(trials)}; mend that, and "
                    "start again with another name="
                )
            for frozen in trials:
                if frozen.state.name == "RUNNING" and frozen.number not in self._left:
                    owner = self._own(frozen.number, new=self.search.settings.sweep.storage is None)
                    if owner is not None:
                        return self._open(optuna.Trial(self.study, frozen._trial_id), owner)
            waits = "WAITING" in states
            if not waits and len(trials) >= self.search.settings.sweep.trials:
                return None
            if self.search.settings.sweep.sampler == "grid" and not waits:
                return None
            trial = self.study.ask()
            owner = self._own(trial.number, new=True)
            assert owner is not None
            return self._open(trial, owner)

    def _own(self, number: int, new: bool) -> int | None:
        """The lock on a trial; None when another process has it, or when it is of another machine.

        new: make the file where there is none. Without that, a trial whose folder is not here is not ours.
        """
        file = self.search.folder / f"trial-{number:04d}" / OWNER
        if not new and not file.exists():
            return None
        file.parent.mkdir(parents=True, exist_ok=True)
        owner = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(owner)
            return None
        return owner

    def _open(self, trial: Any, owner: int) -> Trial:
        settings = self.search.settings
        # Of its own, so that what is drawn depends on the trials before it and not on which worker draws.
        self.study.sampler = sampler_for(settings.sweep.sampler, int(fingerprint(settings.seed, trial.number), 16))
        chosen = suggest(trial, self.search.space)
        folder = self.search.folder / f"trial-{trial.number:04d}"
        choices = [f"{name}={value}" for name, value in chosen.items()]
        entry = Entry(folder.name, choices, str(folder))
        try:
            job = self.search.job(trial.number, chosen)
            check_run(folder, job.config)
        except UserError as error:
            entry.state, entry.reason = FAILED, str(error)
            job = Job(folder.name, tuple(choices), (), self.search.settings)
        known = self.study.get_trials(deepcopy=False)[trial.number]
        return Trial(
            trial, job, owner, entry, losses=dict(known.intermediate_values), pruned_at=known.user_attrs.get(PRUNED_AT)
        )

    def advance(self, one: Trial, environment: dict[str, str], stopping: bool) -> bool:
        """Start, watch or end a trial; True when it is over."""
        if one.entry.state == FAILED:
            return self._end(one)
        if one.running is None:
            if stopping:
                return self._end(one)
            one.running = start(one.job, one.entry, self.search.settings.sweep.evaluate, environment)
            if one.running is None:  # the process of a worker that was killed has not ended yet
                return False
            if one.pruned_at is not None:  # and all that is missing is to say so
                one.running.end_at_once()
                return self._end(one)
            print(f"{one.entry.name}: {', '.join(one.job.choices)}", flush=True)
        self._report(one)
        if not one.running.poll(stopping or one.pruned_at is not None):
            return False
        self._report(one, at_end=True)
        return self._end(one)

    def _report(self, one: Trial, at_end: bool = False) -> None:
        """Tell optuna the validation losses that are new, and end the trial when it says so."""
        metrics, config = one.entry.folder / "metrics.jsonl", one.entry.folder / "config.yaml"
        if not (metrics.exists() and config.exists()):
            return
        one.steps = one.steps or load_frozen(config).train.steps
        with open(metrics, "rb") as file:
            file.seek(one.place)
            rows = list(read_rows(file))
            one.place = file.tell()
        for row in rows:
            loss, share = row.get(self.search.settings.sweep.metric), 100 * row["step"] // one.steps
            if loss is None or share in one.losses:
                continue
            one.losses[share] = loss
            one.trial.report(loss, share)
            if not at_end and share < 100 and not one.is_asked and one.trial.should_prune():
                one.trial.set_user_attr(PRUNED_AT, share)  # first: a worker that is killed here must not go on
                one.pruned_at = share
                one.ask_to_end()

    def _end(self, one: Trial) -> bool:
        """Tell optuna how the trial ended, and the user; it may go on later when it was stopped."""
        import optuna  # noqa: PLC0415

        entry, state = one.entry, optuna.trial.TrialState
        loss, said = one.losses.get(100), f"{entry.name}: "
        if entry.state in (FINISHED, FAILED) or one.pruned_at is not None:
            one.trial.set_user_attr(FLOPS, flops_of(entry.folder))
        if entry.state == FINISHED and loss is not None:
            self.study.tell(one.trial, loss)
            said += f"{self.search.settings.sweep.metric} {loss:.4f}"
        elif entry.state in (FAILED, FINISHED):
            reason = entry.reason or f"no {self.search.settings.sweep.metric} at its end"
            one.trial.set_user_attr(REASON, reason)
            self.study.tell(one.trial, state=state.FAIL)
            said += f"failed: {reason}"
        elif one.pruned_at is not None:
            self.study.tell(one.trial, state=state.PRUNED)
            loss = one.losses[one.pruned_at]
            said += f"pruned at {one.pruned_at} % of its steps, {self.search.settings.sweep.metric} {loss:.4f}"
        else:
            self._left.add(one.trial.number)
            said += entry.reason or "not started"
        ended = sum(trial.state.is_finished() for trial in self.study.get_trials(deepcopy=False))
        print(f"{ended} ended  {said}", flush=True)
        self.write()
        os.close(one.owner)
        return True

    def write(self) -> None:
        """search.json and the best trial as an experiment, by whichever worker comes last."""
        with _locked(self.search.folder):
            write_record(self.search, self.study, self.command)


def _reason(trials: list[Any]) -> str:
    return next(trial.user_attrs.get(REASON, "") for trial in reversed(trials) if trial.state.name == "FAIL")

"""What a search leaves for people: search.json, the best trial as an experiment, and the table at its end."""

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmtrain.config import UserError, write_text_atomic
from mmtrain.config.compose import load_frozen
from mmtrain.config.search import Search, as_experiment
from mmtrain.flops import Ledger
from mmtrain.track import closing_box, redact
from mmtrain.train.status import read_status
from mmtrain.verbs.sweep import SEARCH

BEST = "experiment/best.yaml"
PRUNED_AT, REASON, FLOPS = "pruned_at", "reason", "flops"  # user attributes of a trial
SPENT, EVALUATION, IN_FULL = "training", "evaluation", "without_pruning"


def flops_of(run: Path) -> dict[str, int]:
    """FLOPs of a trial by its own ledger: of training, of validation, and of training for all of its steps."""
    try:
        ledger, status = Ledger.read(run / "ledger.json"), read_status(run)
    except UserError:
        return {}  # it failed before its first step
    trained, step = ledger.training_total, status.step if status else 0
    steps = load_frozen(run / "config.yaml").train.steps
    in_full = trained * steps // step if step else trained
    return {SPENT: trained + ledger["repeated"], EVALUATION: ledger["evaluation"], IN_FULL: in_full}


def books(trials: list[Any]) -> dict[str, Any]:
    """The FLOPs of all trials that have ended, and what they would have cost without pruning."""
    told = [trial.user_attrs[FLOPS] for trial in trials if trial.user_attrs.get(FLOPS)]
    total = {book: sum(flops[book] for flops in told) for book in (SPENT, EVALUATION, IN_FULL)}
    saved = 1 - total[SPENT] / total[IN_FULL] if total[IN_FULL] else 0.0
    return {**total, "saved": round(saved, 4)}


def write_record(search: Search, study: Any, command: str) -> None:
    """Replace search.json and, once a trial has completed, the experiment of the best one."""
    trials = study.get_trials(deepcopy=False)
    best = best_of(trials)
    rows = [
        {
            "name": f"trial-{trial.number:04d}",
            "state": trial.state.name.lower(),
            "settings": trial.params,
            "metric": trial.value,
            "pruned_at": trial.user_attrs.get(PRUNED_AT),
            "reason": trial.user_attrs.get(REASON, ""),
            "flops": trial.user_attrs.get(FLOPS, {}),
        }
        for trial in trials
    ]
    content = {
        "command": command,
        "storage": redact(search.settings.sweep.storage or "study.db"),
        "metric": search.settings.sweep.metric,
        "best": best and f"trial-{best.number:04d}",
        "flops": books(trials),
        "trials": rows,
    }
    write_text_atomic(search.folder / SEARCH, json.dumps(content, indent=1) + "\n")
    if best:
        what = f"trial-{best.number:04d}, {search.settings.sweep.metric} {best.value:.4f}"
        comment = f"the best of {search.folder.name}: {what}"
        file = search.folder / BEST
        if not file.exists() or comment not in file.read_text(encoding="utf-8"):
            file.parent.mkdir(exist_ok=True)
            job = search.job(best.number, {key: str(best.params[key]) for key in search.space})
            write_text_atomic(file, as_experiment(search, job, comment))


def best_of(trials: list[Any]) -> Any:
    """The completed trial of the smallest loss, or None."""
    completed = [trial for trial in trials if trial.state.name == "COMPLETE"]
    return min(completed, key=lambda trial: trial.value, default=None)


def print_search(search: Search, study: Any, was_stopped: bool) -> int:
    """Print all trials, the books and what to do next; returns the exit code."""
    trials, name = study.get_trials(deepcopy=False), search.folder.name
    best, metric = best_of(trials), search.settings.sweep.metric
    table = Table("trial", "state", metric, "train FLOPs", "settings", title=name, title_justify="left")
    for trial in trials:
        at, flops = trial.user_attrs.get(PRUNED_AT), trial.user_attrs.get(FLOPS, {})
        state = trial.state.name.lower()
        table.add_row(
            f"{trial.number:04d}" + (" best" if best is not None and trial.number == best.number else ""),
            f"{state} at {at} %" if state == "pruned" else state,
            "" if trial.value is None else f"{trial.value:.4f}",
            f"{flops[SPENT]:.2e}" if flops else "",
            " ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in trial.params.items()),
        )
    Console().print(table)
    states = [trial.state.name for trial in trials]
    total, place = books(trials), os.path.relpath(search.folder)
    places = {
        "trials": os.path.relpath(search.folder / SEARCH),
        "compute": f"{total[SPENT]:.3e} FLOPs of training; without pruning {total[IN_FULL]:.3e}: "
        f"{100 * total['saved']:.0f} % saved; {total[EVALUATION]:.2e} of validation",
    }
    for trial in trials:
        if trial.state.name == "FAIL":
            log = f"{place}/trial-{trial.number:04d}/logs/sweep.log"
            places[f"failed: {trial.number:04d}"] = f"{trial.user_attrs.get(REASON)} ({log})"
    if best:
        places["best"] = f"trial-{best.number:04d}, {metric} {best.value:.4f}: {place}/{BEST}"
        places["next"] = f"mmtrain train --config-dir {place} experiment=best"
    if "RUNNING" in states or "WAITING" in states:
        places["next"] = "the same command goes on" + ("" if was_stopped else ", or another worker is at it")
    counts = ", ".join(f"{states.count(state)} {state.lower()}" for state in dict.fromkeys(states))
    closing_box(f"{name}: {'stopped; ' if was_stopped else ''}{counts}", places)
    return 1 if "FAIL" in states else 0


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

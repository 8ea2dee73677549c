"""`mmtrain sweep wandb`: a search as the file of a W&B sweep, whose agents run `mmtrain train`."""

import os
from pathlib import Path
from typing import Any

import yaml

from mmtrain.config import write_text_atomic
from mmtrain.config.listing import search_path
from mmtrain.config.override import read_override
from mmtrain.config.search import Range, Search, plan_search
from mmtrain.track import closing_box
from mmtrain.track.wandb_names import wandb_key

FILE = "wandb-sweep.yaml"
METHODS = {"tpe": "bayes", "random": "random", "grid": "grid"}
# The agent gives a run its id in the environment, after it has filled in ${envvar:...}.
SHELL = ["/bin/sh", "-c", 'exec mmtrain train "$@" name="$WANDB_RUN_ID"', "mmtrain"]


def main(argv: list[str]) -> int:
    """Write SEARCH/wandb-sweep.yaml, or the file of out=FILE."""
    outs = [word.partition("=")[2] for word in argv if word.startswith("out=")]
    search, _ = plan_search([word for word in argv if not word.startswith("out=")])
    path = Path(outs[-1]) if outs else search.folder / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, yaml.safe_dump(sweep_file(search), sort_keys=False, width=120))
    track = search.settings.track
    at = f"{track.entity}/{track.project}" if track.entity else track.project
    places = {"sweep": os.path.relpath(path), "start": f"wandb sweep {os.path.relpath(path)}"}
    closing_box("W&B sweep", places | {"then": f"wandb agent {at}/SWEEP_ID   (on as many machines as you like)"})
    return 0


def sweep_file(search: Search) -> dict[str, Any]:
    """The content of the file. Runs get their W&B id as name, in the folder of the search."""
    sweep, track = search.settings.sweep, search.settings.track
    words = [*search.own, f"root={search.folder}"]
    if not any(word.startswith("track.wandb=") for word in words):
        words.append("track.wandb=online")  # a run that W&B does not see is no run of the sweep
    folders = search_path(search.config_dir)[1:]
    options = [word for folder in folders for word in ("--config-dir", str(folder))]
    content: dict[str, Any] = {"name": search.folder.name, "project": track.project, "program": "mmtrain"}
    if track.entity:
        content["entity"] = track.entity
    content |= {"method": METHODS[sweep.sampler], "metric": {"name": wandb_key(sweep.metric), "goal": "minimize"}}
    if sweep.sampler != "grid":
        content["run_cap"] = sweep.trials
    content["parameters"] = {key: _parameter(key, values, sweep.sampler) for key, values in search.space.items()}
    if sweep.pruner != "none":
        content["early_terminate"] = {"type": "hyperband", "min_iter": _first_rung(search), "eta": sweep.reduction}
    return content | {"command": ["${env}", *SHELL, *options, *words, "${args_no_hyphens}"]}


def _parameter(key: str, values: Range | tuple[str, ...], sampler: str) -> dict[str, Any]:
    if not isinstance(values, Range):
        return {"values": [_plain(key, value) for value in values]}
    if sampler == "grid":
        return {"values": [_plain(key, value) for value in values.points()]}
    ends = {"min": values.low, "max": values.high}
    if values.log:
        if values.is_whole:
            return {"distribution": "q_log_uniform_values", **ends, "q": 1}
        return {"distribution": "log_uniform_values", **ends}
    if values.step:
        return {"distribution": "q_uniform", **ends, "q": values.step}
    return {"distribution": "int_uniform" if values.is_whole else "uniform", **ends}


def _plain(key: str, value: str) -> Any:
    """A number as such, so that W&B draws it on an axis; everything else as a command line says it."""
    read = read_override(f"{key}={value}", {}).value if "." in key or key == "seed" else value
    return read if isinstance(read, (int, float)) and not isinstance(read, bool) else value


def _first_rung(search: Search) -> int:
    """The same for W&B, which counts validations; with a budget in FLOPs the number of steps is not known yet."""
    train, sweep = search.settings.train, search.settings.sweep
    if train.flops:
        return 1
    return max(1, round(sweep.first_rung * train.steps / train.evaluate_every))

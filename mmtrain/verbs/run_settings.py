"""The settings of runs, of this version or an older one: what differs between runs, and from a run's experiment."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from mmtrain.config import UserError
from mmtrain.track import redact

NOT_COMPARED = ("name", "root", "run", "data_dir", "sweep")  # where a run is, and not what it is
Settings = dict[str, str]


def read_settings(folder: Path) -> Settings:
    """What config.yaml of a run says, by dotted key, without secrets; of an older version of mmtrain, too.

    Raises UserError when it cannot be read.
    """
    file = folder / "config.yaml"
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read ({str(error).splitlines()[0]}); give another run") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a configuration; give the folder of a training run")
    return flatten(content)


def flatten(tree: Mapping[str, Any]) -> Settings:
    """{"optim": {"lr": 0.1}} -> {"optim.lr": "0.1"}, without NOT_COMPARED and without secrets."""

    def walk(value: Any, key: str) -> Settings:
        if isinstance(value, dict) and value:
            parts = (walk(inner, f"{key}.{name}" if key else str(name)) for name, inner in value.items())
            return {name: text for part in parts for name, text in part.items()}
        return {key: value if isinstance(value, str) else json.dumps(value, default=str)}

    flat = walk(redact(dict(tree)), "")
    return {key: value for key, value in flat.items() if key.partition(".")[0] not in NOT_COMPARED}


def differing(runs: Sequence[Settings]) -> list[str]:
    """The keys that do not have one value in all runs, in the order of the first run that has them."""
    keys = dict.fromkeys(key for run in runs for key in run)
    return [key for key in keys if len({run.get(key) for run in runs}) > 1]


def from_experiment(folder: Path, settings: Settings) -> tuple[str, dict[str, tuple[str, str]]]:
    """What a run was made from, and the settings that are not as there: key -> (there, in the run)."""
    from mmtrain.config.compose import compose

    try:
        words = shlex.split(json.loads((folder / "environment.json").read_text(encoding="utf-8"))["command"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        words = []
    named = [word for word in words if word.startswith("experiment=")]
    origin = named[-1] if named else "the defaults"
    try:
        base = compose(named[-1:])
    except UserError:
        origin, base = f"the defaults ({origin} is not here)", compose([])
    there = flatten(asdict(base))
    changed = {key: (there.get(key, "no such key"), value) for key, value in settings.items()}
    return origin, {key: pair for key, pair in changed.items() if pair[0] != pair[1]}

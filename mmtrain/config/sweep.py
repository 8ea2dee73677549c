"""A sweep: the words of one command in, the jobs that they describe out, all of them checked.

Axes are written as in Hydra: model=tiny,small  seed=range(0,4)  'notes="a, b",c'  model=glob(chameleon*). They are
crossed with each other, with those of sweep.grid and with the named sets of settings of sweep.cases. What the command
line says of a key replaces what the file says of it.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Transformer
from hydra.errors import HydraException

from mmtrain.config.artifact import fingerprint
from mmtrain.config.compose import compose, compose_unchecked
from mmtrain.config.errors import UserError
from mmtrain.config.listing import groups
from mmtrain.config.override import plain_value, quoted, read_override
from mmtrain.config.schema import Config

LONGEST_NAME = 120
WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.+-]*")
OF_THE_WHOLE = ("name", "root", "run", "sweep")
"""What a sweep has once, not each of its jobs."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    name: str
    """Its folder within the sweep's: the case and what was chosen on each axis, fit for a file name."""
    choices: tuple[str, ...]
    """What is its own: the settings of its case, and one of each axis."""
    overrides: tuple[str, ...]
    """The whole command line after `mmtrain train`, name and root included."""
    config: Config


@dataclass(frozen=True)
class Sweep:
    """folder: holds the run directories of the jobs; settings: the section `sweep`, with the rest of a run."""

    folder: Path
    settings: Config
    jobs: tuple[Job, ...]


def expand(words: list[str], config_dir: Path | None = None) -> Sweep:
    """The jobs that the words of a command describe, each composed and validated.

    Raises UserError for the first thing that does not exist or cannot work in any of them.
    """
    known = groups(config_dir)
    axes: dict[str, list[str]] = {}
    rest: dict[str, str] = {}
    for word in words:
        key = read_key(word)
        values = _values(word, key, known)
        axes.pop(key, None)
        rest.pop(key, None)
        if values is None:
            rest[key] = word
        else:
            axes[key] = values
    for key in axes:
        if key.partition(".")[0] in OF_THE_WHOLE:
            raise UserError(f"{key} cannot be an axis: it belongs to the whole sweep; give it one value")
    if "experiment" in axes and "name" not in rest:
        raise UserError("a sweep over experiments has no name of its own; add name=NAME")
    settings = compose_unchecked([*rest.values(), *(f"{key}={values[0]}" for key, values in axes.items())], config_dir)
    from_file = {key: [written(value) for value in values] for key, values in settings.sweep.grid.items()}
    axes = {key: values for key, values in from_file.items() if key not in rest} | axes
    own = {key: word for key, word in rest.items() if key.partition(".")[0] not in OF_THE_WHOLE}
    if not settings.track.group:
        own["track.group"] = f"track.group={written(settings.name)}"
    folder = Path(settings.root) / settings.name
    jobs = _jobs(settings.sweep.cases or {"": []}, axes, own, folder, config_dir)
    return Sweep(folder, settings, tuple(jobs))


def read_key(word: str) -> str:
    """The key of an override, without Hydra's signs."""
    return word.lstrip("+").partition("=")[0]


def _values(word: str, key: str, known: Mapping[str, Mapping[str, Path]]) -> list[str] | None:
    """The values of an axis, each as the command line of a job says it; None when the word gives one value."""
    try:
        parsed = OverridesParser.create().parse_override(word.lstrip("+"))
    except HydraException:
        parsed = None
    if parsed is None or not parsed.is_sweep_override():
        read_override(word, known)
        return None
    value = parsed.value()
    if isinstance(value, IntervalSweep):
        raise UserError(f"{word} is an interval, which has no end of values; give a list of them, or range(...)")
    if isinstance(value, Glob):
        values = value.filter(list(known.get(key, {})))
    else:
        values = [plain_value(item) for item in parsed.sweep_iterator(transformer=Transformer.identity)]
    if not values:
        raise UserError(f"{word} matches nothing; there is {', '.join(known.get(key, {})) or 'no such group'}")
    return [written(item) for item in values]


def _jobs(
    cases: Mapping[str, list[str]],
    axes: Mapping[str, list[str]],
    own: Mapping[str, str],
    folder: Path,
    config_dir: Path | None,
) -> list[Job]:
    """Every case crossed with every value of every axis, composed; own: what all jobs are told, by key."""
    known = groups(config_dir)
    for key, values in axes.items():
        if not values:
            raise UserError(f"sweep.grid.{key} is empty; give it values, or take it out")
        for value in values:
            read_override(f"{key}={value}", known)
    told = {case: [word for word in words if read_key(word) not in own] for case, words in cases.items()}
    for case, words in told.items():
        for key in (read_override(word, known).key for word in words):
            if key in axes:
                raise UserError(f"{key} is set by case {case} and is an axis of the grid, too; take one out")
    parts, choices = _crossed(told, axes)
    if len(choices) < 2 and not axes:
        raise UserError(
            "this sweep has one run; write several values (optim.lr=1e-3,3e-3), set sweep.grid or sweep.cases, or "
            "leave out -m"
        )
    jobs = []
    for name, (of_case, on_axes) in zip(_names(parts), choices, strict=True):
        overrides = (*of_case, *own.values(), *on_axes, f"name={name}", f"root={folder}")
        try:
            jobs.append(Job(name, (*of_case, *on_axes), overrides, compose([*overrides], config_dir)))
        except UserError as error:
            raise UserError(f"job {name}: {error}") from error
    return jobs


def _crossed(
    cases: Mapping[str, list[str]], axes: Mapping[str, list[str]]
) -> tuple[list[list[str]], list[tuple[list[str], list[str]]]]:
    """For each job the parts of its name, and its settings: those of the case, and one of each axis."""
    leaf = {key: key.rpartition(".")[2] for key in axes}
    uses = Counter(leaf.values())
    short = {key: leaf[key] if uses[leaf[key]] == 1 else key for key in axes}
    parts: list[list[str]] = []
    choices: list[tuple[list[str], list[str]]] = []
    for case, of_case in cases.items():
        for values in product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            choice = (of_case, [f"{key}={value}" for key, value in chosen.items()])
            named = [*([case] if case else []), *(f"{short[key]}={value}" for key, value in chosen.items())]
            if choice in choices:
                raise UserError(f"{','.join(named)} is in the sweep twice; say it once")
            parts.append(named)
            choices.append(choice)
    return parts, choices


def _names(jobs: list[list[str]]) -> list[str]:
    """A file name for each job from its parts (case, KEY=VALUE); a fingerprint tells apart what came out equal."""
    safe = []
    for parts in jobs:
        words = [re.sub(r"[^A-Za-z0-9._=+-]+", "-", re.sub(r"['\"\\[\]{}]", "", part)) for part in parts]
        safe.append(re.sub(r"^[^A-Za-z0-9]+", "", ",".join(words)) or "run")
    count = Counter(name[:LONGEST_NAME] for name in safe)
    return [
        name if len(name) <= LONGEST_NAME and count[name] == 1 else f"{name[:LONGEST_NAME]}-{fingerprint(parts)[:6]}"
        for name, parts in zip(safe, jobs, strict=True)
    ]


def written(value: Any) -> str:
    """A plain value in Hydra's grammar, so that `read_override` gives it back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        is_word = WORD.fullmatch(value) and value.lower() not in ("null", "true", "false", "nan", "inf")
        return value if is_word else quoted(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{written(name)}:{written(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(written, value)) + "]"
    short = f"{value:g}" if isinstance(value, float) else ""
    return short if "e" in short and float(short) == value else str(value)  # 4.5e+11, not 450000000000.0

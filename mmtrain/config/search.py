"""A search: the words of `mmtrain sweep` in, a checked search space and the job of each trial out.

A space has the names of settings, each with its values, or a range: [0.0, 0.1], {low: 1e-4, high: 1e-1, log: true},
{low: 2, high: 6, step: 2}. Whole numbers are drawn for settings that are whole numbers.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from mmtrain.config.compose import compose, compose_unchecked
from mmtrain.config.errors import UserError
from mmtrain.config.listing import conf_folder, groups
from mmtrain.config.override import declared_type, read_override
from mmtrain.config.schema import Config
from mmtrain.config.suggest import known_keys, suggestion
from mmtrain.config.sweep import OF_THE_WHOLE, Job, read_key, written

RANGE_KEYS = {"low", "high", "log", "step"}


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included; log: drawn on a logarithmic scale; step: between neighbors, if any."""

    low: float
    high: float
    log: bool
    step: float | None
    is_whole: bool

    @property
    def ends(self) -> tuple[str, str]:
        return written(self.low), written(self.high)

    def points(self) -> tuple[str, ...]:
        """All values, as a command line says them; () where there is no end of them."""
        step = self.step or (1 if self.is_whole and not self.log else None)
        if step is None:
            return ()
        number = int((self.high - self.low) / step + 1e-9) + 1
        values = [self.low + i * step for i in range(number)]
        return tuple(written(int(value) if self.is_whole else round(value, 12)) for value in values)


Space = dict[str, Range | tuple[str, ...]]
"""By setting: a range, or its values as a command line says them."""


@dataclass(frozen=True)
class Search:
    """folder: holds the run directories of the trials; settings: the section `sweep`, with the rest of a run."""

    folder: Path
    settings: Config
    space: Space
    own: tuple[str, ...]
    """The words that all trials have."""
    config_dir: Path | None = None

    def job(self, number: int, chosen: Mapping[str, str]) -> Job:
        """The trial `number`; chosen: values by setting. Raises UserError for a combination that cannot work."""
        name = f"trial-{number:04d}"
        choices = tuple(f"{key}={value}" for key, value in chosen.items())
        overrides = (*self.own, *choices, f"name={name}", f"root={self.folder}")
        return Job(name, choices, overrides, compose([*overrides], self.config_dir))


def with_name(words: list[str], option: str | None = None) -> list[str]:
    """`words` with sweep=`option` where none is chosen, and with the name of the sweep where they give none.

    Raises UserError where an experiment brings another sweep.
    """
    given = {read_key(word): word.partition("=")[2] for word in words}
    if option and "sweep" not in given:
        words = [f"sweep={option}", *words]
        given["sweep"] = option
    if given.get("sweep") and given.get("experiment"):
        section = compose_unchecked([f"experiment={given['experiment']}"]).sweep
        if section.grid or section.cases or section.space:
            raise UserError(
                f"experiment={given['experiment']} has a sweep of its own, beside sweep={given['sweep']}; leave one out"
            )
    return words if "name" in given or not given.get("sweep") else [*words, f"name={given['sweep']}"]


def plan_search(words: list[str], config_dir: Path | None = None) -> tuple[Search, list[Job]]:
    """The search that the words of a command describe, and jobs with every value and both ends of every range.

    Raises UserError for the first thing that does not exist or cannot work.
    """
    known = groups(config_dir)
    words = with_name(words)
    given = {read_override(word, known).key: word for word in words}  # the later wins
    settings = compose_unchecked([*given.values()], config_dir)
    own = tuple(word for key, word in given.items() if key.partition(".")[0] not in OF_THE_WHOLE)
    asked = {key: values for key, values in settings.sweep.space.items() if key not in given}
    if not asked:
        raise UserError(
            "there is no search space: choose one with sweep=NAME (`mmtrain ls sweep`), or write sweep.space in a file"
        )
    space = read_space(asked, known)
    search = Search(Path(settings.root) / settings.name, settings, space, own, config_dir)
    _check_settings(search)
    first = {key: choices[0] for key, choices in _to_try(space).items()}
    tried = [first, *({key: choice} for key, choices in _to_try(space).items() for choice in choices[1:])]
    jobs = []
    for chosen in tried:
        try:
            jobs.append(search.job(0, first | chosen))
        except UserError as error:
            said = ", ".join(f"{key}={choice}" for key, choice in chosen.items())
            raise UserError(f"sweep.space: with {said}: {error}") from error
    return search, jobs


def read_space(space: Mapping[str, Any], known: Mapping[str, Mapping[str, Path]]) -> Space:
    """The space as files write it, checked against the schema; known: the groups. Raises UserError."""
    return {key: _read_values(key, asked, known) for key, asked in space.items()}


def _read_values(key: str, asked: Any, known: Mapping[str, Mapping[str, Path]]) -> Range | tuple[str, ...]:
    if key not in known_keys() and key not in known:
        raise UserError(f"sweep.space: {key} is not a key of the configuration; {suggestion(key, known)}")
    if key.partition(".")[0] in OF_THE_WHOLE:
        raise UserError(f"sweep.space: {key} belongs to the whole search; it cannot be varied")
    where = f"sweep.space: {key}: "
    if isinstance(asked, Mapping):
        values: Range | tuple[str, ...] = _read_range(where, asked, declared_type(key))
    elif isinstance(asked, list) and asked:
        values = tuple(written(value) for value in asked)
        if len(set(values)) < len(values):
            raise UserError(f"{where}a value is there twice: {', '.join(values)}")
    else:
        raise UserError(f"{where}{asked!r} is neither a list of values nor a range such as {{low: 1, high: 4}}")
    for value in values.ends if isinstance(values, Range) else values:
        try:
            read_override(f"{key}={value}", known)
        except UserError as error:
            raise UserError(f"sweep.space: {error}") from error
    return values


def _read_range(where: str, asked: Mapping[str, Any], declared: str) -> Range:
    if declared not in ("int", "float"):
        raise UserError(f"{where}a range is for settings that are numbers; give a list of values")
    unknown = asked.keys() - RANGE_KEYS
    if unknown or not {"low", "high"} <= asked.keys():
        what = f"{sorted(unknown)[0]} is none of its keys" if unknown else "low or high is missing"
        raise UserError(f"{where}a range has low, high and, if wanted, log or step; {what}")
    low, high, step = asked["low"], asked["high"], asked.get("step")
    number = int if declared == "int" else (int, float)
    for name, value in (("low", low), ("high", high), ("step", step)):
        if (value is not None or name != "step") and (not isinstance(value, number) or isinstance(value, bool)):
            raise UserError(f"{where}{name}={value} must be a {'whole ' if declared == 'int' else ''}number")
    log = asked.get("log", False)
    if not isinstance(log, bool):
        raise UserError(f"{where}log={log} must be true or false")
    if not low < high:
        raise UserError(f"{where}low={low} must be smaller than high={high}")
    if log and (low <= 0 or step):
        raise UserError(f"{where}a logarithmic range begins above 0 and has no step")
    if step is not None and step <= 0:
        raise UserError(f"{where}step={step} must be above 0")
    return Range(low, high, log, step, declared == "int")


def _to_try(space: Space) -> dict[str, tuple[str, ...]]:
    """Values of every setting that are composed before the first trial: all of a list, the ends of a range."""
    return {key: values.ends if isinstance(values, Range) else values for key, values in space.items()}


def _check_settings(search: Search) -> None:
    sweep, train = search.settings.sweep, search.settings.train
    if sweep.grid or sweep.cases:
        raise UserError("sweep.grid and sweep.cases are for `mmtrain train -m`; a search has sweep.space alone")
    if sweep.retry_failed:
        raise UserError("sweep.retry_failed is for `mmtrain train -m`; raise sweep.trials to replace failed trials")
    endless = [key for key, values in search.space.items() if isinstance(values, Range) and not values.points()]
    if sweep.sampler == "grid" and endless:
        raise UserError(f"sweep.sampler=grid needs steps, and the range of {endless[0]} has none; give it a step")
    ends_first = not train.evaluate_every or (not train.flops and train.evaluate_every >= train.steps)
    if sweep.pruner != "none" and ends_first and "train.evaluate_every" not in search.space:
        raise UserError(
            f"train.evaluate_every={train.evaluate_every} gives no validation loss before the end, on which trials "
            "could be pruned; set it to a twentieth of the steps, or sweep.pruner=none"
        )


def as_experiment(search: Search, job: Job, comment: str) -> str:
    """The settings of a trial as a file of the group experiment, with `comment` as its summary.

    What other files say is taken from there by name; where they are not mmtrain's own, every key is written down.
    """
    known, ours = groups(search.config_dir), conf_folder()
    head = f"# @package _global_\n# {comment}\n"
    read = {(found := read_override(word, known)).key: found for word in (*search.own, *job.choices)}
    files = [known[key][value.value] for key, value in read.items() if value.is_choice and value.value]
    name = f"{search.folder.name}_best"
    if any(ours not in file.parents for file in files):
        config = asdict(job.config) | {"name": name, "root": search.settings.root}
        return head + yaml.safe_dump({key: value for key, value in config.items() if key != "sweep"}, sort_keys=False)
    content: dict[str, Any] = {"defaults": ["_self_"], "name": name}
    for key, override in read.items():
        if key == "experiment":
            content["defaults"].insert(0, override.value)
        elif override.is_choice:
            content["defaults"].append({f"override /{key}": override.value})
        else:
            section, _, leaf = key.rpartition(".")
            (content.setdefault(section, {}) if section else content)[leaf] = override.value
    return head + yaml.safe_dump(content, sort_keys=False)

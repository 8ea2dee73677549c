"""Overrides in, one validated `Config` out; and the frozen config.yaml of a run.

Hydra composes the YAML groups on top of the dataclasses of schema.py, which make unknown keys and wrong
types errors. Nothing is instantiated from configuration: there is no `_target_`.
"""

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from mmtrain.config.artifact import write_text_atomic
from mmtrain.config.errors import UserError
from mmtrain.config.listing import groups, search_path
from mmtrain.config.override import Override, expectation, quoted, read_override
from mmtrain.config.schema import Config, CorpusConfig, ModelConfig
from mmtrain.config.suggest import did_you_mean, known_keys, nearest, suggestion
from mmtrain.config.validate import validate
from mmtrain.config.weights import ARCHITECTURE, with_weights

SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)


def compose(overrides: list[str], config_dir: Path | None = None) -> Config:
    """The configuration that `overrides` (KEY=VALUE, GROUP=OPTION, experiment=NAME) describe.

    Later wins: schema, groups, experiment, overrides. `config_dir` (or --config-dir) adds a folder of the
    user's own options, laid out like conf/. Raises UserError for what does not exist or cannot work.
    """
    config = _compose(overrides, config_dir)
    if config.model.weights:
        config = with_weights(config, _explicit_model_keys(config, overrides, config_dir))
    return validate(_resolved(config, config_dir))


def compose_unchecked(overrides: list[str], config_dir: Path | None = None) -> Config:
    """As `compose`, but whether the whole can work is not looked at: for what stands in front of a sweep's jobs."""
    return _compose(overrides, config_dir)


def _explicit_model_keys(config: Config, overrides: list[str], config_dir: Path | None) -> set[str]:
    """Keys of the section model that were set by who set model.weights: on the command line, or in the same files."""
    said = [read_override(text, groups(config_dir)).key for text in overrides]
    keys = {key.removeprefix("model.") for key in said if key.startswith("model.")}
    if "weights" in keys:
        return keys | {*ARCHITECTURE, "max_positions"} if "model" in said else keys
    usual = [asdict(_compose([], config_dir).model), asdict(ModelConfig())]
    return keys | {key for key, value in asdict(config.model).items() if all(value != of[key] for of in usual)}


def _compose(overrides: list[str], config_dir: Path | None) -> Config:
    _install_resolvers()
    known_groups = groups(config_dir)
    read = [read_override(text, known_groups) for text in overrides]
    arguments = [override.text for override in read]
    folders = search_path(config_dir)
    if len(folders) > 1:
        arguments.append(f"hydra.searchpath=[{quoted(f'file://{folders[1]}')}]")
    schema = _schema()
    try:
        with initialize_config_dir(config_dir=str(folders[0]), version_base="1.3"):
            composed = hydra_compose("config", overrides=arguments)
        container = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        return _to_config(schema, container)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise _explained(error, [override.text for override in read if override.is_choice]) from error


def with_overrides(config: Config, overrides: list[str], config_dir: Path | None = None) -> Config:
    """`config` (a frozen one) with `overrides` on top; GROUP=OPTION replaces the whole section.

    Raises UserError as `compose` does, and for experiment=…, which belongs to a new run.
    """
    known_groups = groups(config_dir)
    node = _schema()
    for override in [read_override(text, known_groups) for text in overrides]:
        if override.key == "experiment":
            raise UserError(f"experiment={override.value} starts a new run; leave it out here, the run has its own")
        if override.is_choice:
            section = getattr(_compose([override.text], config_dir), override.key)
            config = replace(config, **{override.key: section})
        else:
            config = _with_value(node, config, override)
    return validate(_resolved(config, config_dir))


def _resolved(config: Config, config_dir: Path | None = None) -> Config:
    """`config` with the corpora that it mixes, and model.picture_grid=-1 replaced by the grid of its pictures."""
    if config.mix:
        corpora = {name: _corpus(config, name, config_dir) for name in config.mix}
        config = replace(config, corpora=corpora)
    if config.model.picture_grid >= 0:
        return config
    grid = config.corpus.image_size // config.image_tokenizer.downsample
    return replace(config, model=replace(config.model, picture_grid=grid))


def _corpus(config: Config, name: str, config_dir: Path | None) -> CorpusConfig:
    """The corpus that a mix names: the run's own, one of `corpora`, or an option; pictures are of the run's size."""
    if name == config.corpus.name:
        return config.corpus
    found = config.corpora.get(name)
    if found is None:
        options = groups(config_dir)["corpus"]
        if name not in options:
            known = dict.fromkeys([config.corpus.name, *config.corpora, *options])
            close = nearest(name, known)
            hint = did_you_mean(close) if close else f"there is {', '.join(known)}"
            raise UserError(f"mix names the corpus {name}, which does not exist; {hint}")
        found = _compose([f"corpus={name}"], config_dir).corpus
    return replace(found, name=name, image_size=config.corpus.image_size)


def _with_value(schema: DictConfig, config: Config, override: Override) -> Config:
    merged = OmegaConf.merge(schema, _escaped(asdict(config)))
    OmegaConf.update(merged, override.key, _escaped(override.value))
    result = OmegaConf.to_object(merged)
    assert isinstance(result, Config)
    return result


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, sections in the order of the schema."""
    text = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True, width=120)
    if "\x85" in text:  # PyYAML writes "next line" as it is, and reads it back as a blank
        text = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=False, width=120)
    return text


def freeze(config: Config, path: Path) -> None:
    """Write `config` to `path` (config.yaml of a run), atomically."""
    write_text_atomic(path, to_yaml(config))


def load_frozen(path: Path) -> Config:
    """Read what `freeze` wrote, validated again; a `${…}` in it is text, never an interpolation."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the run directory of a run that was started")
    try:
        container = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(container, dict):
            raise UserError(f"{path} is not a configuration; it must hold what `mmtrain train --cfg job` prints")
        return validate(_to_config(_schema(), container))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise _explained(error, [str(path)]) from error


@functools.cache
def _schema() -> DictConfig:
    """`Config` as OmegaConf knows it, stored where Hydra finds it; made once, as it takes longer than most of Hydra."""
    schema = OmegaConf.structured(Config)
    ConfigStore.instance().store(name="schema", node=schema)
    return schema


def _to_config(schema: DictConfig, container: Any) -> Config:
    """Plain values (already resolved) as a Config; raises OmegaConf's errors."""
    result = OmegaConf.to_object(OmegaConf.merge(schema, _escaped(container)))
    assert isinstance(result, Config)
    return result


def _escaped(value: Any) -> Any:
    """`value` with `${` escaped, so that text which happens to hold it stays text."""
    if value == MISSING:
        raise UserError(f"a value of the configuration is {MISSING}, which stands for one that is still to be given")
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_escaped(item) for item in value]
    return value


def _install_resolvers() -> None:
    """Replace OmegaConf's `oc.env`: resolved configurations are saved and uploaded, secrets must not get in."""

    def environment(name: str, default: str | None = None) -> str | None:
        if SECRET_NAME.search(name):
            raise UserError(f"${{oc.env:{name}}} looks like a secret, and configurations are saved; leave it out")
        value = os.environ.get(name, default)
        if value is None:
            raise UserError(f"${{oc.env:{name}}} is not set in the environment, and the configuration gives no default")
        return value

    OmegaConf.register_new_resolver("oc.env", environment, replace=True)


def _explained(error: BaseException, chosen: Sequence[str] = ()) -> UserError:
    """One sentence for an error of Hydra or OmegaConf in a file; `chosen` are the options that were asked for."""
    chain = _chain(error)
    for link in chain:
        if isinstance(link, UserError):
            return link
        if isinstance(link, MissingConfigException) and link.missing_cfg_file and link.options:
            group, _, option = link.missing_cfg_file.rpartition("/")
            close = nearest(option, link.options)
            hint = did_you_mean(close) if close else f"there is {', '.join(link.options)}"
            return UserError(f"{group}={option} (in {_files(chosen)}) does not exist; {hint}")
    keys = [str(link.full_key) for link in chain if isinstance(link, OmegaConfBaseException) and link.full_key]
    lines = [line.strip() for line in str(chain[-1] or error).splitlines() if line.strip()]
    if not keys:
        return UserError(f"{_files(chosen)} cannot be composed: " + "; ".join(lines[:2]).rstrip("."))
    key = keys[-1]
    if key.partition(".")[0] == "experiment":
        return UserError(f"{_files(chosen)} lacks its first line; an experiment begins with '# @package _global_'")
    if key not in known_keys():
        return UserError(f"{key} (in {_files(chosen)}) is not a key of the configuration; {suggestion(key)}")
    if any(isinstance(link, ValidationError) for link in chain):
        return UserError(f"{key} in {_files(chosen)} must be {expectation(key)}")
    return UserError(f"{key} in {_files(chosen)}: {lines[0].rstrip('.')}")


def _chain(error: BaseException) -> list[BaseException]:
    """`error` and what caused it, the root last."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def _files(chosen: Sequence[str]) -> str:
    return " ".join(chosen) or "the configuration"

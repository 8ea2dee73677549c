"""One word of the command line, KEY=VALUE or GROUP=OPTION, read and checked against what exists."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmtrain.config.errors import UserError
from mmtrain.config.schema import Config
from mmtrain.config.suggest import did_you_mean, known_keys, nearest, section_names, suggestion

TYPE_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


@dataclass(frozen=True)
class Override:
    """A checked override."""

    key: str
    value: Any
    is_choice: bool
    """GROUP=OPTION rather than KEY=VALUE."""
    text: str
    """How to say it to Hydra."""


def read_override(text: str, groups: Mapping[str, Mapping[str, Path]]) -> Override:
    """Read `text` in Hydra's grammar; raises UserError when its key, option or type does not exist.

    groups: group -> option -> file, as `listing.groups` returns it.
    """
    raw = text.lstrip("+")  # Hydra's "add" sign; a key is either there or it is not
    if raw.startswith("-"):
        raise UserError(f"{text} is not an option of mmtrain; settings are written KEY=VALUE, see `mmtrain --help`")
    if raw.startswith("~"):
        raise UserError(f"{text}: keys cannot be removed; set the key to null, 0 or false instead")
    key, equals, raw_value = raw.partition("=")
    if not equals or not key:
        raise UserError(f"{text!r} is not KEY=VALUE; {suggestion(text, groups)}")
    is_choice = key in groups
    if not is_choice and key not in known_keys():
        raise UserError(_unknown_key(key, raw_value, groups))
    value, raw_value = _parse(key, raw_value)
    if value == MISSING:
        raise UserError(f"{key}={MISSING} stands for a value that is still to be given; give it")
    if is_choice:
        _check_option(key, value, groups[key])
    else:
        _check_type(key, value, raw_value)
    adds = "++" if declared_type(key).startswith("dict[") else ""  # its keys are not in the schema
    return Override(key, value, is_choice, f"{adds}{key}={raw_value}")


def _unknown_key(key: str, raw_value: str, groups: Mapping[str, Mapping[str, Path]]) -> str:
    if key in section_names():
        examples = [name for name in known_keys() if name.startswith(f"{key}.")][:3]
        return f"{key}={raw_value}: {key} is a section, set one of its keys, such as {', '.join(examples)}"
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return f"{key}={raw_value}: settings of Hydra itself cannot be changed; mmtrain keeps its own run directories"
    return f"{key} is not a key of the configuration; {suggestion(key, groups)}"


def _parse(key: str, raw_value: str) -> tuple[Any, str]:
    """The value as Python sees it, and the text that says so to Hydra."""
    declared = declared_type(key)
    takes_null = declared.endswith(" | None") and raw_value.lower() == "null"
    if declared.startswith("str") and not takes_null and not raw_value.startswith(("'", '"')) and "${" not in raw_value:
        # The value of a text key is what was typed: name=2024_10_31 is no number, notes=a, b no list.
        return raw_value, quoted(raw_value)
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={raw_value}")
        if parsed.is_sweep_override():
            raise UserError(
                f"{key}={raw_value} gives several values, and a run has one; `mmtrain train -m` starts a run for each"
            )
        return plain_value(parsed.value()), raw_value
    except HydraException as error:
        raise UserError(
            f"{key}={raw_value} cannot be read; a list is written [one,two], and a text in it that holds any of "
            "\\ , : = ' \" ( ) [ ] { } in quotes of its own, such as 'generate.prompts=[\"red, then blue\"]'"
        ) from error


def quoted(text: str) -> str:
    """`text` as a quoted string of Hydra's grammar."""
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{chr(92) * trailing}'"


def plain_value(value: Any) -> Any:
    """Hydra's parsed value as plain Python."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [plain_value(item) for item in value]
    if isinstance(value, dict):
        return {str(name): plain_value(item) for name, item in value.items()}
    return value


def _check_option(group: str, value: Any, options: Mapping[str, Path]) -> None:
    if (isinstance(value, str) and value in options) or (group == "experiment" and value is None):
        return
    if isinstance(value, (dict, list)):
        raise UserError(f"{group}=… takes the name of an option ({', '.join(options)}); keys are set one by one")
    close = nearest(str(value), options)
    hint = did_you_mean(close) if close else f"there is {', '.join(options)}"
    more = "; a folder of your own is added with --config-dir DIR" if group == "experiment" and not close else ""
    raise UserError(f"{group}={value} does not exist; {hint}{more}")


@cache
def _any_config() -> DictConfig:
    """To try values on: building it takes longer than all the rest."""
    return OmegaConf.structured(Config)


def _check_type(key: str, value: Any, raw_value: str) -> None:
    try:
        OmegaConf.update(_any_config(), key, value, merge=False)
    except OmegaConfBaseException as error:
        raise UserError(f"{key}={raw_value} must be {expectation(key)}") from error


def _field(key: str) -> Any:
    section, _, leaf = key.rpartition(".")
    owner = Config.__dataclass_fields__[section].type if section else Config
    return owner.__dataclass_fields__[leaf]  # type: ignore[union-attr]


def declared_type(key: str) -> str:
    """`int`, `str | None`, `list[int]`; empty for the name of a group."""
    if key not in known_keys():
        return ""
    declared = _field(key).type
    return declared.__name__ if isinstance(declared, type) and not hasattr(declared, "__args__") else str(declared)


def expectation(key: str) -> str:
    """What a value of `key` must be, with the meaning of the key."""
    declared = declared_type(key)
    meaning = f" ({_field(key).metadata['help'].rstrip('.')})" if key in known_keys() else ""
    if declared.startswith("list["):
        return f"a list such as {'[8,5,5,5]' if 'int' in declared else '[one,two]'}{meaning}"
    if declared.startswith("dict["):
        return f"names with values, such as {{stamps:1,gimp_help:3}}{meaning}"
    base = declared.removesuffix(" | None")
    return TYPE_NAMES.get(base, base) + (" or null" if base != declared else "") + meaning

"""Writes the reference of the configuration: `python -m mmtrain.config.reference > docs/reference/config.md`."""

import sys
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from mmtrain.config.schema import Config

HEADER = """\
# Configuration reference

Generated from `mmtrain/config/schema.py` by `python -m mmtrain.config.reference`; do not edit.

Every key can be set on the command line (`mmtrain train model.layers=12`) or in a file of a group
(`conf/experiment/mine.yaml`). `mmtrain ls` lists the groups and their options; they and experiments change the
defaults below. `mmtrain train --cfg job` prints what a command amounts to.
"""


def reference() -> str:
    """The whole reference as Markdown: one table per section, one row per key."""
    sections = [item for item in fields(Config) if is_dataclass(item.type)]
    parts = [HEADER, _section("The run", "", "One run.", [item for item in fields(Config) if item not in sections])]
    for item in sections:
        kind: Any = item.type
        parts.append(_section(f"`{item.name}`", f"{item.name}.", kind.__doc__.strip(), fields(kind)))
    return "\n".join(parts)


def _section(title: str, prefix: str, text: str, items: Any) -> str:
    rows = [
        f"| `{prefix}{item.name}` | {_type(item)} | {_default(item)} | {_allowed(item)} | {_text(item)} |"
        for item in items
    ]
    head = "| Key | Type | Default | Allowed | Meaning |\n|---|---|---|---|---|"
    return f"## {title}\n\n{text}\n\n{head}\n" + "\n".join(rows) + "\n"


def _type(item: Field) -> str:
    kind: Any = item.type
    plain = type(kind) is type
    name = kind.__name__ if plain else str(kind)
    return "dict" if name.startswith("dict[") else name.replace(" | None", " or null")


def _default(item: Field) -> str:
    value: Any = item.default
    if value is MISSING:
        factory: Any = item.default_factory
        value = factory()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"`[{','.join(str(entry) for entry in value)}]`"
    return f"`{value}`" if value else "empty" if value in ("", {}) else f"`{value}`"


def _allowed(item: Field) -> str:
    choices, minimum, maximum = (item.metadata[name] for name in ("choices", "minimum", "maximum"))
    if choices:
        return ", ".join(str(choice) for choice in choices)
    if minimum is not None and maximum is not None:
        return f"{minimum:g} to {maximum:g}"
    if minimum is not None:
        return f"at least {minimum:g}"
    return f"at most {maximum:g}" if maximum is not None else ""


def _text(item: Field) -> str:
    return item.metadata["help"].replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())

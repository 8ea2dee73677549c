"""Did you mean …: the nearest keys and options to what was typed."""

import difflib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from functools import cache

from mmtrain.config.schema import Config


@cache
def known_keys() -> tuple[str, ...]:
    """Every dotted key that holds a value, in the order of the schema."""
    keys = []
    for item in fields(Config):
        if is_dataclass(item.type):
            keys += [f"{item.name}.{leaf.name}" for leaf in fields(item.type)]
        else:
            keys.append(item.name)
    return tuple(keys)


@cache
def section_names() -> tuple[str, ...]:
    """The sections of the configuration: corpus, model, …"""
    return tuple(item.name for item in fields(Config) if is_dataclass(item.type))


def nearest(typed: str, known: Iterable[str], limit: int = 3, cutoff: float = 0.6) -> list[str]:
    """Up to `limit` of `known` that resemble `typed` (difflib ratio of at least `cutoff`), best first."""
    return difflib.get_close_matches(typed, list(known), n=limit, cutoff=cutoff)


def did_you_mean(matches: list[str]) -> str:
    """`did you mean a, b or c?`"""
    *first, last = matches
    return f"did you mean {', '.join(first)} or {last}?" if first else f"did you mean {last}?"


def suggestion(typed: str, more: Iterable[str] = ()) -> str:
    """What somebody who typed the unknown key `typed` may have meant; `more` are other names beside the keys."""
    keys = known_keys()
    section, _, leaf = typed.rpartition(".")
    leaf_of = {key: key.rpartition(".")[2] for key in keys}
    in_section = [leaf_of[key] for key in keys if section and key.startswith(f"{section}.")]
    close_leaves = nearest(leaf, set(leaf_of.values()), limit=1, cutoff=0.75)
    candidates = (
        [f"{section}.{name}" for name in nearest(leaf, in_section)],
        [key for key in keys if leaf_of[key] == leaf],
        [] if in_section else nearest(typed, dict.fromkeys([*keys, *section_names(), *more])),
        [key for key in keys if leaf_of[key] in close_leaves],
    )
    for matches in candidates:
        if matches:
            return did_you_mean(matches[:4])
    if in_section:
        return f"{section} has {', '.join(in_section)}"
    return "`mmtrain ls` lists what can be chosen, docs/reference/config.md every key"

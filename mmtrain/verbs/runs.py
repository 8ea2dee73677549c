"""`mmtrain runs ls|show|compare|watch`: how runs are doing and how they went."""

import json
import math
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from mmtrain.config import UserError
from mmtrain.track.console import duration, human
from mmtrain.verbs.run_state import FAILED, FINISHED, RUNNING, STALLED, STOPPED, RunState, list_runs

ROOT = "runs"
WIDTH_OF_FILES = 160
OPTIONS = {"ls": ("root",), "show": ("root",), "compare": ("root", "out"), "watch": ("root", "every")}
COLORS = {RUNNING: "green", FINISHED: "blue", STOPPED: "yellow", STALLED: "bold red", FAILED: "red"}
HEADINGS = ("run", "state", "step", "tokens", "loss", "validation", "MFU causal", "FLOPs", "checkpoint", "last row")
# What `--json` gives of metrics.jsonl.
NUMBERS = ("tokens", "loss", "loss_text", "loss_image", "val_loss", "val_loss_text", "val_loss_image", "mfu_causal",
           "mfu_palm", "hfu", "tokens_per_second", "step_seconds", "flops_total")  # fmt: skip


def main(argv: list[str]) -> int:
    """ls [PATTERN ...] | show [RUN] | compare RUN ... | watch [RUN], each with root=DIR; see `mmtrain runs --help`."""
    words = [word for word in argv if word != "--json" and word.partition("=")[0] not in ("root", "out", "every")]
    options = dict(word.split("=", 1) for word in argv if word not in words and "=" in word)
    action, named = (words[0], words[1:]) if words else ("ls", [])
    if action not in OPTIONS:
        raise UserError(f"`mmtrain runs {action}` means nothing; there is {', '.join(OPTIONS)}")
    if unknown := [word for word in named if word.startswith("-")] or list(options.keys() - set(OPTIONS[action])):
        raise UserError(f"`mmtrain runs {action}` takes {'=, '.join(OPTIONS[action])}=, not {unknown[0]}")
    as_json = "--json" in argv
    if as_json and action not in ("ls", "show"):
        raise UserError(f"`mmtrain runs {action}` has no --json; `mmtrain runs ls` and `show` have")
    root = Path(options.get("root") or ROOT)
    if action == "ls":
        return _list(root, named, as_json)
    if action == "compare":
        from mmtrain.verbs.runs_compare import compare

        return compare(named, root, options.get("out"))
    if len(named) > 1:
        raise UserError(f"`mmtrain runs {action}` takes one run, not {len(named)}")
    word = named[0] if named else None
    if action == "show":
        from mmtrain.verbs.runs_show import show

        return show(word, root, as_json)
    from mmtrain.verbs.runs_watch import watch

    return watch(word, root, options.get("every"))


def _list(root: Path, patterns: list[str], as_json: bool) -> int:
    """A line for each run whose name fits one of the patterns."""
    runs = list_runs(root)
    chosen = [run for run in runs if not patterns or any(fnmatch(run.name, pattern) for pattern in patterns)]
    if as_json:
        print(json.dumps({"root": str(root), "runs": [as_plain(run) for run in chosen]}, indent=1))
    elif not runs:
        print(f"no run under {root} yet; `mmtrain train experiment=quickstart` makes one")
    elif not chosen:
        print(f"none of the {len(runs)} runs under {root} is named {' or '.join(patterns)}")
    else:
        _print(chosen)
    return 0


def as_plain(run: RunState) -> dict[str, Any]:
    """A run as JSON-able values; times in Unix seconds, NaN as null."""
    plain: dict[str, Any] = {
        "name": run.name,
        "folder": str(run.folder),
        "state": run.state,
        "reason": run.reason,
        "step": run.step,
        "steps": run.steps,
    }
    plain |= {key: None if math.isnan(run.numbers.get(key, math.nan)) else run.numbers[key] for key in NUMBERS}
    written = {"checkpoint_step": run.checkpoint_step, "checkpoint_time": run.checkpoint_time}
    return plain | written | {"row_time": run.row_time}


def _print(runs: Sequence[RunState]) -> None:
    """A table and the reasons below it; rich would take longer to lay out a thousand lines than they take to read."""
    table = [HEADINGS, *((run.name, run.state, *cells(run)) for run in runs)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        [
            cell.ljust(width) if number < 2 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in table
    ]
    console = Console(highlight=False, markup=False)
    for number, line in enumerate(lines):
        words = printable("  ".join(line).rstrip())
        if console.is_terminal:
            text = Text(words, "bold" if number == 0 else "")
            if number:
                text.stylize(COLORS.get(runs[number - 1].state, ""), widths[0] + 2, widths[0] + 2 + widths[1])
            console.print(text, soft_wrap=True)
        else:
            print(words)
    for run in runs:
        if run.reason and run.state != FINISHED:
            print(printable(f"{run.name} {run.state}: {run.reason}"))


def printable(words: str) -> str:
    """`words` without what would move the cursor, or reorder what follows: names of folders may be another's."""
    return words if words.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in words)


def cells(run: RunState) -> list[str]:
    """Step, tokens, loss, validation loss, MFU, FLOPs, checkpoint, age of the last row; empty where not known."""
    checkpoint = f"{run.checkpoint_step} ({age(run.checkpoint_time)})" if run.checkpoint_step is not None else ""
    return [
        f"{run.step}/{run.steps}" if run.steps else str(run.step or ""),
        number(run, "tokens", human),
        number(run, "loss", "{:.4f}".format),
        number(run, "val_loss", "{:.4f}".format),
        number(run, "mfu_causal", "{:.1%}".format),
        number(run, "flops_total", "{:.2e}".format),
        checkpoint,
        age(run.row_time),
    ]


def number(run: RunState, key: str, form: Any) -> str:
    """A number of the run as text; "" where there is none."""
    value = run.numbers.get(key)
    return "" if value is None else "nan" if math.isnan(value) else form(value)


def age(when: float | None) -> str:
    """How long ago, in short."""
    return "" if when is None else f"{duration(time.time() - when)} ago"

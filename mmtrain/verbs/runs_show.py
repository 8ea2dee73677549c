"""`mmtrain runs show`: all about one run that fits on a screen."""

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmtrain.config import UserError
from mmtrain.track import closing_box, goodput
from mmtrain.track.console import duration, human
from mmtrain.track.page import scientific
from mmtrain.verbs.run_settings import from_experiment, read_settings
from mmtrain.verbs.run_state import CHECKPOINT, FINISHED, METRICS, RunState, find_run, read_run
from mmtrain.verbs.runs import WIDTH_OF_FILES, age, as_plain, number

PLACES = ("config.yaml", "metrics.jsonl", "ledger.json", "checkpoints", "samples", "report.html", "logs", "wandb")
MODALITIES = ("", "_text", "_image", "_special")


def show(word: str | None, root: Path, as_json: bool) -> int:
    """Print a run, as JSON where asked for."""
    folder = find_run(word, root)
    run = read_run(folder)
    facts = describe(run)
    if as_json:
        print(json.dumps(as_plain(run) | facts, indent=1))
        return 0
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDTH_OF_FILES
    _print(run, facts, console)
    return 0


def describe(run: RunState) -> dict[str, Any]:
    """What the files of a run say beside its state; a part that cannot be read says so as `unreadable`."""
    facts: dict[str, Any] = {}
    for name, part in {
        "settings": _settings,
        "ledger": _ledger,
        "goodput": _goodput,
        "checkpoints": _checkpoints,
        "wandb": _wandb,
    }.items():
        try:
            facts[name] = part(run.folder)
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            facts[name] = {"unreadable": str(error)}
    return facts


def _settings(folder: Path) -> dict[str, Any]:
    origin, changed = from_experiment(folder, read_settings(folder))
    return {"from": origin, "changed": {key: list(pair) for key, pair in changed.items()}}


def _ledger(folder: Path) -> dict[str, Any]:
    file = folder / "ledger.json"
    if not file.exists():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    books = {str(name): int(flops) for name, flops in content["flops"].items() if flops}
    return books | {"training_total": int(content["training_total"]), "spent_total": int(content["spent_total"])}


def _goodput(folder: Path) -> dict[str, Any]:
    account = goodput(folder)
    if account is None or account.ratio is None:
        return {}
    return {
        "ratio": account.ratio,
        "productive_seconds": account.productive_seconds,
        "wall_seconds": account.wall_seconds,
        "steps_done_twice": account.lost_steps,
        "interruptions": [{"step": i.step, "cause": i.cause} for i in account.interruptions],
    }


def _checkpoints(folder: Path) -> dict[str, Any]:
    """By name: step, bytes, time, whether it is kept for good, from the manifest; nothing is hashed."""
    found = {}
    for path in sorted((folder / "checkpoints").glob("step-*")):
        if not CHECKPOINT.fullmatch(path.name):
            continue
        try:
            manifest = json.loads((path / "MANIFEST.json").read_text(encoding="utf-8"))
            size = sum(int(file["bytes"]) for file in manifest["files"].values())
            found[path.name] = {"bytes": size, "time": float(manifest["time"]), "permanent": manifest["permanent"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            found[path.name] = {"unreadable": "incomplete or damaged"}
    return found


def _wandb(folder: Path) -> dict[str, Any]:
    """The id of the run there, how many segments lie here, and whether `mmtrain sync` has something to send."""
    segments = [path for path in (folder / "wandb").glob("*run-*") if path.is_dir()]
    id_file, marker = folder / "run_id", folder / "wandb" / "synced.json"
    run_id = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else None
    is_waiting = any(path.name.startswith("offline-") for path in segments)
    if marker.is_file() and (folder / METRICS).is_file():
        is_waiting = marker.stat().st_mtime < (folder / METRICS).stat().st_mtime
    return {"id": run_id, "segments": len(segments), "is_waiting": is_waiting}


def _print(run: RunState, facts: dict[str, Any], console: Console) -> None:
    say = console.out
    folder = shortest(run.folder)
    reason = f": {run.reason}" if run.reason else ""
    say(f"{folder}: {run.state}{reason}")
    parts = [f"step {run.step} of {run.steps or '?'}", f"{number(run, 'tokens', human) or 'no'} tokens"]
    if flops := number(run, "flops_total", scientific):
        parts.append(f"{flops} training FLOPs")
    if run.row_time:
        parts.append(f"last row {age(run.row_time)}")
    say(", ".join(parts))
    speed = [
        ("{} tokens per second", "tokens_per_second", human),
        ("{} seconds per step", "step_seconds", "{:.3g}".format),
        ("{} MFU (model FLOPs, causal)", "mfu_causal", "{:.1%}".format),
        ("{} MFU (PaLM: full attention)", "mfu_palm", "{:.1%}".format),
    ]
    said = [form.format(number_text) for form, key, show in speed if (number_text := number(run, key, show))]
    if said:
        say("last row: " + ", ".join(said))
    if run.steps and run.goes_on and run.numbers.get("step_seconds"):
        say(f"about {duration((run.steps - run.step) * run.numbers['step_seconds'])} of steps to go")

    rows = []
    for kind in MODALITIES:
        losses = [number(run, f"{prefix}loss{kind}", "{:.4f}".format) for prefix in ("", "val_")]
        rows += [[kind.strip("_") or "all", *losses]] if any(losses) else []
    _section(console, "losses", ("tokens", "training", "validation"), rows)
    settings = facts["settings"]
    changed = [[key, *pair] for key, pair in settings.get("changed", {}).items()]
    title = f"settings that are not those of {settings.get('from', 'the experiment')}"
    _section(console, title, ("", "there", "here"), changed, settings)
    books = facts["ledger"]
    spent = books.get("spent_total") or 1
    lines = [[name, scientific(flops), f"{flops / spent:.1%}"] for name, flops in books.items() if name != "unreadable"]
    _section(console, "FLOPs by what they were spent on", ("", "FLOPs", "share"), lines, books)
    account = facts["goodput"]
    if "ratio" in account:
        say(f"\ngoodput {account['ratio']:.1%}: {duration(account['productive_seconds'])} of "
            f"{duration(account['wall_seconds'])} in steps that count; {len(account['interruptions'])} interruptions, "
            f"{account['steps_done_twice']} steps done twice")  # fmt: skip
    for interruption in account.get("interruptions", []):
        say(f"  at step {interruption['step']}: {interruption['cause']}")
    lines = [
        [name, "", entry["unreadable"], ""]
        if "unreadable" in entry
        else [name, f"{entry['bytes'] / 1e6:,.1f} MB", age(entry["time"]), "kept for good" * entry["permanent"]]
        for name, entry in facts["checkpoints"].items()
    ]
    _section(console, "checkpoints", ("", "size", "written", ""), lines)
    _places(run, facts["wandb"], folder)


def _section(
    console: Console, title: str, headings: tuple[str, ...], rows: list[list[str]], facts: dict[str, Any] | None = None
) -> None:
    """A table, where there is anything in it; what cannot be read says so."""
    if facts and "unreadable" in facts:
        console.out(f"\n{title}: cannot be read ({facts['unreadable']})")
    if not rows:
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.out(f"\n{title}")
    console.print(table)


def _places(run: RunState, wandb: dict[str, Any], folder: str) -> None:
    """Where everything is, and what to do next."""
    places = {"folder": folder, "in it": ", ".join(name for name in PLACES if (run.folder / name).exists())}
    if wandb.get("segments"):
        state = "not uploaded; `mmtrain sync` does it" if wandb["is_waiting"] else "uploaded"
        places["W&B"] = f"run {wandb['id']}: {state}"
    if run.goes_on:
        places["next"] = f"mmtrain runs watch {folder}"
    elif run.state == FINISHED:
        places["next"] = f"mmtrain generate run={folder}; mmtrain report run={folder}"
    closing_box(run.name, places)


def shortest(folder: Path) -> str:
    """The shorter one of its relative and its absolute path."""
    return min(os.path.relpath(folder), str(folder.resolve()), key=len)

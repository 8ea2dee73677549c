"""`mmtrain runs watch`: follow a run from outside until it ends; nothing here touches the run."""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from rich.box import ROUNDED
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mmtrain.config import UserError
from mmtrain.track.console import describe, duration, human
from mmtrain.track.metrics import Row, last_rows, parse_row
from mmtrain.verbs.run_state import FAILED, METRICS, RunState, find_run, read_run
from mmtrain.verbs.runs import COLORS, age, number

EVERY_SECONDS = 2.0
FIRST_ROWS = 5  # of those that are there already, for plain output
MODALITIES = {"all": "", "text": "_text", "image": "_image"}


def watch(word: str | None, root: Path, every: str | None) -> int:
    """Follow a run; 0 when it finished, was stopped or is not running, 1 when it failed."""
    try:
        seconds = float(every) if every else EVERY_SECONDS
        if not 0.05 <= seconds <= 3600:
            raise ValueError
    except ValueError as error:
        raise UserError(f"every={every} must be seconds between two looks, such as 2 or 0.5") from error
    folder = find_run(word, root)
    console = Console(highlight=False)
    try:
        run = _live(folder, seconds, console) if console.is_terminal else _plain(folder, seconds, console)
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0] if interrupt.args else signal.SIGINT
        _say(console, f"no longer watching; {folder} is left alone")
        return 128 + int(number)
    reason = f": {run.reason}" if run.reason else ""
    _say(console, f"{run.name} {run.state} at step {run.step} of {run.steps or '?'}{reason}")
    return 1 if run.state == FAILED else 0


def _states(folder: Path, seconds: float) -> Iterator[RunState]:
    """The state of the run again and again, the last one being that in which it does not go on."""
    while True:
        run = read_run(folder)
        yield run
        if not run.goes_on:
            return
        time.sleep(seconds)


def _live(folder: Path, seconds: float, console: Console) -> RunState:
    """A panel that is drawn anew."""
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for run in _states(folder, seconds):
            live.update(_panel(run), refresh=True)
    return run


def _panel(run: RunState) -> Panel:
    """Progress, losses by modality beside validation, and what tells whether the run is well."""
    losses = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("loss", "training", "validation"):
        losses.add_column(heading, justify="left" if heading == "loss" else "right")
    for name, suffix in MODALITIES.items():
        values = [number(run, f"{prefix}loss{suffix}", "{:.4f}".format) for prefix in ("", "val_")]
        if any(values):
            losses.add_row(name, *values)
    numbers = run.numbers
    facts = {
        "tokens": number(run, "tokens", human),
        "tokens/s": number(run, "tokens_per_second", human),
        "MFU, causal": number(run, "mfu_causal", "{:.1%}".format),
        "training FLOPs": number(run, "flops_total", "{:.3g}".format),
        "learning rate": number(run, "lr", "{:.2e}".format),
        "gradient norm": number(run, "grad_norm", "{:.3g}".format),
        "skipped updates": number(run, "skipped_updates", "{:.0f}".format),
        "spikes": number(run, "spikes", "{:.0f}".format),
        "checkpoint": f"step {run.checkpoint_step}, {age(run.checkpoint_time)}" if run.checkpoint_time else "none yet",
        "last row": age(run.row_time) or "none yet",
    }
    shown = Table.grid(padding=(0, 2))
    known = [(label, value) for label, value in facts.items() if value]
    for first, second in zip(known[::2], [*known[1::2], ("", "")], strict=False):
        shown.add_row(Text(first[0], "dim"), first[1], Text(second[0], "dim"), second[1])
    head = Text.assemble((run.state, COLORS.get(run.state, "")), f"  step {run.step:,} of {run.steps or 0:,}")
    left = (run.steps or 0) - run.step
    if run.goes_on and left > 0 and numbers.get("step_seconds"):
        head.append(f"  {duration(left * numbers['step_seconds'])} of steps to go")
    if run.reason:
        head.append(f"  {run.reason}", "red")
    bar = Table.grid()  # a bar alone ends no line
    bar.add_row(ProgressBar(total=max(1, run.steps or 1), completed=run.step, width=60))
    parts: list[RenderableType] = [head, bar, *([losses] if losses.row_count else []), shown]
    return Panel(Group(*parts), title=Text(run.name), title_align="left", box=ROUNDED, expand=False)


def _plain(folder: Path, seconds: float, console: Console) -> RunState:
    """A line per row, as training itself prints them; those that are there already only at their end."""
    place = (folder / METRICS).stat().st_size if (folder / METRICS).exists() else 0
    run = read_run(folder)
    for row in last_rows(folder / METRICS)[-FIRST_ROWS:]:
        _say(console, _line(row, run))
    said = ""
    for run in _states(folder, seconds):
        rows, place = _new_rows(folder / METRICS, place)
        for row in rows:
            _say(console, _line(row, run))
        if run.reason != said and run.goes_on:
            _say(console, f"{run.state}: {run.reason}" if run.reason else run.state)
        said = run.reason
    rows, _ = _new_rows(folder / METRICS, place)
    for row in rows:
        _say(console, _line(row, run))
    return run


def _line(row: Row, run: RunState) -> str:
    with contextlib.suppress(TypeError, ValueError):  # numbers that are none
        return f"step {row['step']}/{run.steps or '?'}  {describe(row)}"
    return f"step {row['step']}/{run.steps or '?'}"


def _new_rows(path: Path, place: int) -> tuple[list[Row], int]:
    """The rows behind byte `place`, and the end of the last whole line."""
    try:
        with open(path, "rb") as file:
            file.seek(place)
            lines, _, rest = file.read().rpartition(b"\n")
            place = file.tell() - len(rest)
    except OSError:
        return [], place
    return [row for line in lines.split(b"\n") if (row := parse_row(line)) is not None], place


def _say(console: Console, sentence: str) -> None:
    console.print(Text(sentence), soft_wrap=True)
    console.file.flush()

"""The console: a live line on a terminal, one plain line per row everywhere else."""

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rich.box import ROUNDED
from rich.console import Console as RichConsole
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

SMOOTHING = 0.3  # weight of the newest interval in the ETA


def human(number: float) -> str:
    """1234567 -> "1.2M"; for tokens and tokens per second."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size * 0.9995:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """3725 -> "1h02m", 65 -> "1m05s"."""
    whole = max(0, round(seconds))
    if whole >= 86400:
        return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def describe(row: Mapping[str, Any]) -> str:
    """The numbers of a row that a person watches, in one short line; what the row lacks is left out."""

    def part(label: str, key: str, form: str) -> str | None:
        value = row.get(key)
        return None if value is None else f"{label} {value:{form}}"

    parts = [
        part("loss", "loss", ".4f"),
        part("text", "loss_text", ".3f"),
        part("image", "loss_image", ".3f"),
        part("val", "val_loss", ".4f"),
        part("lr", "lr", ".2e"),
        part("grad", "grad_norm", ".2f"),
    ]
    if row.get("tokens_per_second") is not None:
        parts.append(f"{human(row['tokens_per_second'])} tok/s")
    parts.append(part("MFU", "mfu_causal", ".1%"))
    return "  ".join(text for text in parts if text)


class Console:
    """Shows rows as they come. `stream`: where to (default: standard output); a terminal gets a live line."""

    def __init__(self, total_steps: int, resumed_step: int = 0, stream: TextIO | None = None):
        self.total_steps = total_steps
        self._rich = RichConsole(file=stream or sys.stdout, highlight=False)
        self._last = (resumed_step, time.monotonic())
        self._seconds_per_step: float | None = None
        self._progress: Progress | None = None
        if self._rich.is_terminal:
            self._progress = Progress(
                TextColumn("step {task.completed:,}/{task.total:,}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[numbers]}", markup=False),
                console=self._rich,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task("train", total=total_steps, completed=resumed_step, numbers="starting")
            self._progress.start()

    def start_clock(self) -> None:
        """Training starts now: what came before does not count for the ETA."""
        self._last = (self._last[0], time.monotonic())

    def row(self, step: int, row: Mapping[str, Any]) -> None:
        """Show the numbers of one row."""
        numbers = describe(row)
        eta = self._eta(step)
        if eta is not None:
            numbers += f"  ETA {duration(eta)}"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=numbers)
        else:
            self._print(f"step {step}/{self.total_steps}  {numbers}")

    def message(self, text: str) -> None:
        """Show one line, above the live line if there is one."""
        self._print(text)

    def close(self) -> None:
        """End the live line and leave its last state on the screen. Safe to call twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print(self, text: str) -> None:
        # One line per message, never wrapped and never read as markup: logs are searched by line.
        self._rich.print(Text(text), soft_wrap=True)
        self._rich.file.flush()

    def _eta(self, step: int) -> float | None:
        """Seconds to the last step, from the smoothed wall time per step, so evaluation and saving count too."""
        last_step, last_time = self._last
        if step > last_step:
            now = time.monotonic()
            rate = (now - last_time) / (step - last_step)
            before = self._seconds_per_step
            self._seconds_per_step = rate if before is None else SMOOTHING * rate + (1 - SMOOTHING) * before
            self._last = (step, now)
        if self._seconds_per_step is None or step >= self.total_steps:
            return None
        return self._seconds_per_step * (self.total_steps - step)


def closing_box(title: str, places: Mapping[str, object], stream: TextIO | None = None) -> None:
    """Print the box that says where everything is: a label and a path, number or command per line."""
    rich = RichConsole(file=stream or sys.stdout, highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, place in places.items():
        table.add_row(Text(label, style="bold"), Text(str(place)))
    rich.print(Panel(table, title=Text(title), box=ROUNDED, title_align="left", expand=False))

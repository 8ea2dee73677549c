"""Progress of long work: a bar in a terminal, a plain line now and then elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 15.0


class Bar:
    """`with Bar("reading", total) as advance: advance(done)`; total None = unknown until `advance` tells it."""

    def __init__(self, label: str, total: int | None = None):
        self.label, self.total = label, total
        self.console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console, transient=True)
        self.task = self.progress.add_task(label, total=total, note="")
        self.last_line = time.monotonic()

    def __enter__(self) -> "Bar":
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None:
        """`done` of `total` steps are done; `note` stands beside them."""
        self.total = total or self.total
        if self.console.is_terminal:
            self.progress.update(self.task, completed=done, total=self.total, note=note)
        elif time.monotonic() - self.last_line > LINE_SECONDS:
            self.last_line = time.monotonic()
            print(f"  {self.label}: {done:,}{f' of {self.total:,}' if self.total else ''}  {note}", flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.progress.stop()

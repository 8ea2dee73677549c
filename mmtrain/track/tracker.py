"""One row in, three sinks out: metrics.jsonl (always), console, W&B. Constructed on rank 0 only."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmtrain.config import Config
from mmtrain.track.console import Console
from mmtrain.track.metrics import MetricsWriter, plain_row
from mmtrain.track.secrets import redact
from mmtrain.track.wandb_sink import WandbSink

METRICS_FILE = "metrics.jsonl"


class Tracker:
    """Tracks one run. No method raises: a full disk or a dead server is said once and training goes on.

    run_id: identity on W&B, the same for every segment of the run (it travels in the checkpoint).
    resumed_step: steps already done when this segment starts.
    """

    def __init__(self, run_dir: Path, config: Config, total_steps: int, run_id: str, resumed_step: int = 0):
        self.run_dir = Path(run_dir)
        self._said: set[str] = set()
        self._writer: MetricsWriter | None = None
        self.console = Console(total_steps, resumed_step)
        self._guard("write metrics.jsonl", self._open_metrics)
        self.wandb = WandbSink(self.run_dir, config.track, run_id, self.say)
        self.console.start_clock()

    def _open_metrics(self) -> None:
        self._writer = MetricsWriter(self.run_dir / METRICS_FILE)

    def log(self, step: int, row: Mapping[str, float | int | None]) -> None:
        """Record the numbers of one step; None means not measured. A second call for a step adds to it.

        docs/reference/metrics.md has every key, its unit and its name on W&B, which reads metrics.jsonl.
        """
        plain = plain_row({"step": step, **row})
        if self._writer is not None:
            writer = self._writer
            self._guard("write metrics.jsonl", lambda: writer.write(plain))
        self._guard("show progress", lambda: self.console.row(step, plain))

    def alert(self, title: str, text: str, level: str = "WARN") -> None:
        """Have W&B tell the user, by mail or as they chose there. level: INFO, WARN or ERROR."""
        self._guard("send an alert", lambda: self.wandb.alert(title, text, level))

    def say(self, text: str) -> None:
        """One line for the user, without secrets."""
        self._guard("print", lambda: self.console.message(redact(text)))

    def close(self, exit_code: int = 0) -> None:
        """Flush and end every sink; `exit_code` marks the run as finished (0) or failed on W&B."""
        self._guard("end the progress line", self.console.close)
        if self._writer is not None:
            self._guard("close metrics.jsonl", self._writer.close)
            self._writer = None
        self._guard("end W&B", lambda: self.wandb.close(exit_code))

    def _guard(self, what: str, action: Callable[[], Any]) -> None:
        """Do `action`; say once per kind of action when it fails."""
        try:
            action()
        except Exception as error:
            if what not in self._said:
                self._said.add(what)
                self.say(f"Tracking could not {what} ({type(error).__name__}: {error}); training goes on.")

"""RUN/status.json: what the run is doing, or how it ended; written by rank 0, read by whoever started it."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mmtrain.config import write_text_atomic

STATUS = "status.json"


@dataclass(frozen=True)
class Status:
    """state: running, finished, stopped or failed; time: Unix seconds."""

    state: str
    step: int
    reason: str
    time: float


def write_status(run_dir: Path, state: str, step: int, reason: str) -> None:
    """Replace the status of the run."""
    write_text_atomic(run_dir / STATUS, json.dumps(asdict(Status(state, step, reason, time.time()))) + "\n")


def read_status(run_dir: Path) -> Status | None:
    """The last status; None where there is none that can be read."""
    try:
        return Status(**json.loads((run_dir / STATUS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None

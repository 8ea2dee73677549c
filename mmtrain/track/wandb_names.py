"""What the numbers of metrics.jsonl are called on W&B, and what becomes of steps that are done twice."""

from collections.abc import Mapping
from typing import Any

TOKENS, FLOPS = "tokens", "train/flops"
AXES = ("step", TOKENS, FLOPS)
AGAIN = "redone"
LARGEST_INTEGER = 2**53  # of JSON; wandb's service takes no larger one than 2^63

# Sections of the W&B page; keys that are not here go to "train".
SECTIONS = {
    "lr": "optim",
    "grad_norm": "optim",
    "tokens_per_second": "perf",
    "step_seconds": "perf",
    "data_seconds": "perf",
    "mfu_causal": "perf",
    "mfu_palm": "perf",
    "hfu": "perf",
    "prepare_seconds": "perf",
    "padding": "data",
    "split_documents": "data",
    "dropped_retrieved": "data",
    "skipped_updates": "health",
    "spikes": "health",
    "spike_score": "health",
    "rollbacks": "health",
    "output_rms": "health",
    "log_z": "health",
    "gradient_text_rms": "health",
    "gradient_image_rms": "health",
    "gradient_special_rms": "health",
}


def wandb_key(key: str) -> str:
    """Name of a metric on W&B: "loss_text" -> "train/loss_text", "val_loss" -> "val/loss", "lr" -> "optim/lr"."""
    if key == "flops_total":
        return FLOPS
    if key in AXES or "/" in key:
        return key
    if key.startswith("val_"):
        return f"val/{key.removeprefix('val_')}"
    return f"{SECTIONS.get(key, 'train')}/{key}"


class Naming:
    """Turns the rows of metrics.jsonl, in their order, into rows of W&B; one row each.

    W&B cannot take a row back. So a number of a step that was done before (after a crash, or a roll-back) is called
    redone/NAME there: the curves have every step once, as it was done first. metrics.jsonl and report.html have it
    as it was done last.
    """

    def __init__(self) -> None:
        self._reached: dict[str, int] = {}
        """The last step that a number was logged for."""

    def __call__(self, row: Mapping[str, Any]) -> dict[str, float]:
        """The numbers of a row, NaN and infinities restored; `_timestamp` is the time at which it was written."""
        non_finite = {key: float(value) for key, value in (row.get("non_finite") or {}).items()}
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "time"}
        named = {"_timestamp": row["time"]} if "time" in row else {}
        for key, value in (numbers | non_finite).items():
            name = wandb_key(key)
            if name not in AXES and row["step"] <= self._reached.get(key, -1):
                name = f"{AGAIN}/{name}"
            else:
                self._reached[key] = row["step"]
            named[name] = value if abs(value) < LARGEST_INTEGER else float(value)  # FLOPs soon are larger
        return named

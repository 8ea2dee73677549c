"""`mmtrain sync`: bring to W&B what it does not have of runs: rows, checkpoints as references, samples."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from mmtrain.config import UserError, write_text_atomic
from mmtrain.config.compose import load_frozen
from mmtrain.track.follow import alone
from mmtrain.track.metrics import read_rows
from mmtrain.track.secrets import redact
from mmtrain.track.wandb_run import METRICS_FILE, WandbRun, checkpoints, explain, has_login

MARKER = "wandb/synced.json"
FINISH_SECONDS = 600.0


def main(argv: list[str]) -> int:
    """Send all runs below the folders (default: runs); raises UserError when W&B does not take one."""
    if odd := [word for word in argv if word.startswith("-") or "=" in word]:
        raise UserError(f"{odd[0]!r} is no folder; write `mmtrain sync runs/NAME`, or see `mmtrain sync --help`")
    runs = [run for folder in argv or ["runs"] for run in runs_below(Path(folder))]
    if not has_login():
        raise UserError("W&B has no key; run `wandb login`, or set WANDB_API_KEY")
    os.environ["WANDB_MODE"] = "online"
    for run in runs:
        name = os.path.relpath(run)
        try:
            with alone(run, wait=False):
                print(f"{name}: {sync(run)}", flush=True)
        except BlockingIOError as error:
            raise UserError(f"{name} is just being sent to W&B by another process, as while it trains; wait") from error
    return 0


def runs_below(folder: Path) -> list[Path]:
    """The run directory itself, or those below it that W&B is not kept from (track.wandb=disabled)."""
    if (folder / METRICS_FILE).is_file() and (folder / "config.yaml").is_file():
        return [folder]
    found = sorted(path.parent for path in [*folder.glob(f"*/{METRICS_FILE}"), *folder.glob(f"*/*/{METRICS_FILE}")])
    found = [run for run in found if (run / "config.yaml").is_file() and (run / "run_id").is_file()]
    if not found:
        raise UserError(f"{folder} is no run directory, and there is none below it; give the folder of a run")
    return [run for run in found if load_frozen(run / "config.yaml").track.wandb != "disabled"]


def sync(run_dir: Path) -> str:
    """Send what W&B lacks of a run, then ask W&B whether it has it; returns what was done, in a few words."""
    if not (run_dir / "run_id").is_file():
        raise UserError(f"{run_dir}/run_id is missing, which every run has from its first start on: is it all copied?")
    contents = contents_of(run_dir)
    if read_marker(run_dir) == contents:
        return "nothing new"
    rows, pieces, url = send(run_dir, contents)
    if rows and send(run_dir, contents)[0]:
        raise UserError(f"W&B did not keep all rows of {run_dir} (see {url}); the same command tries again")
    write_text_atomic(run_dir / MARKER, json.dumps(contents) + "\n")
    return f"{rows} rows and {pieces} other pieces sent; all {contents['rows']} rows are at {url}"


def send(run_dir: Path, contents: dict[str, Any]) -> tuple[int, int, str | None]:
    """Send what W&B lacks; how many rows and other pieces that was, and the address of the run."""
    with tempfile.TemporaryDirectory(prefix="mmtrain-sync-") as files:
        wandb_run = open_or_complain(run_dir, Path(files))
        if wandb_run.num_rows > contents["rows"]:
            raise UserError(
                f"W&B has {wandb_run.num_rows} rows of {wandb_run.url}, {run_dir} has {contents['rows']}: another "
                "copy of this run went on; sync that one"
            )
        rows, pieces = wandb_run.send_rows(), wandb_run.send_rest()
        if not wandb_run.finish(0 if contents["status"] == "finished" else 1):
            raise UserError(f"W&B did not take all of {run_dir} in {FINISH_SECONDS:.0f} s; the same command goes on")
    return rows, pieces, wandb_run.url


def open_or_complain(run_dir: Path, files: Path) -> WandbRun:
    """The run on W&B; raises UserError when there is no way to it."""
    try:
        return WandbRun(run_dir, "online", files, FINISH_SECONDS)
    except (Exception, SystemExit) as error:
        raise UserError(f"{explain(error)}; nothing is lost, the same command tries again") from error


def contents_of(run_dir: Path) -> dict[str, Any]:
    """What there is to send of a run, and where to: equal to the marker when W&B has all of it."""
    with open(run_dir / METRICS_FILE, "rb") as file:
        rows = sum(1 for _ in read_rows(file))
    samples = sorted(record.parent.name for record in run_dir.glob("samples/*/samples.json"))
    newest = max((step for step, _ in checkpoints(run_dir)), default=0)
    server = redact(os.environ.get("WANDB_BASE_URL", ""))
    return {"rows": rows, "samples": samples, "checkpoint": newest, "status": status_of(run_dir), "server": server}


def read_marker(run_dir: Path) -> Any:
    """What was there when W&B had all of it; None when that never was."""
    try:
        return json.loads((run_dir / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def status_of(run_dir: Path) -> str:
    """The state that training left the run in; "" where it left none."""
    try:
        return str(json.loads((run_dir / "status.json").read_text(encoding="utf-8"))["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""

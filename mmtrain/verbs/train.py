"""`mmtrain train`: prepare what is missing, then train; the same command again continues."""

import os
import shlex
from pathlib import Path

from mmtrain.config import UserError
from mmtrain.config.compose import compose
from mmtrain.track import closing_box
from mmtrain.train.checkpoint import newest
from mmtrain.train.launch import check_batch, launch, num_ranks
from mmtrain.train.run import check_run, open_run


def main(argv: list[str]) -> int:
    """Compose, prepare artifacts, freeze the config and launch; returns the exit code of training."""
    from mmtrain.verbs.prepare import prepare  # noqa: PLC0415

    config = compose(argv)
    check_batch(config, num_ranks(config))
    run_dir = Path(config.root) / config.name
    check_run(run_dir, config)
    open_run(run_dir, config, prepare(config), shlex.join(["mmtrain", "train", *argv]))
    finished = newest(run_dir / "checkpoints")
    if finished is None or finished.step < config.train.steps:
        code = launch(run_dir, config)
        if code:
            raise UserError(
                f"training stopped with exit code {code} (the reason is printed above); mend it and run the same "
                f"command again: it continues from the last checkpoint in {os.path.relpath(run_dir / 'checkpoints')}"
            )
    folder = os.path.relpath(run_dir)
    places = {
        "checkpoints": f"{folder}/checkpoints",
        "metrics": f"{folder}/metrics.jsonl",
        "compute": f"{folder}/ledger.json",
        "next": f"mmtrain generate run={folder}; mmtrain report run={folder}",
    }
    closing_box(f"{config.name}: {config.train.steps} steps trained", places)
    return 0

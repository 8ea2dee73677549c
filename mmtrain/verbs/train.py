"""`mmtrain train`: prepare what is missing, then train; the same command again continues."""

import os
import shlex
from pathlib import Path

from mmtrain.config import UserError
from mmtrain.config.compose import compose
from mmtrain.train.launch import check_batch, launch, num_ranks
from mmtrain.train.run import open_run


def main(argv: list[str]) -> int:
    """Compose, prepare artifacts, freeze the config and launch; returns the exit code of training."""
    from mmtrain.verbs.prepare import prepare  # noqa: PLC0415

    config = compose(argv)
    check_batch(config, num_ranks(config))
    run_dir = Path(config.root) / config.name
    open_run(run_dir, config, shlex.join(["mmtrain", "train", *argv]))
    artifacts = prepare(config)
    artifacts.save(run_dir)
    remember_run(Path(config.root), run_dir)
    code = launch(run_dir, config)
    if code:
        raise UserError(
            f"training stopped with exit code {code} (the reason is printed above); mend it and run the same command "
            f"again: it continues from the last checkpoint in {os.path.relpath(run_dir / 'checkpoints')}"
        )
    return 0


def remember_run(root: Path, run_dir: Path) -> None:
    """Note the last trained run, which generate, evaluate and report take by default."""
    (root / "last").write_text(run_dir.name + "\n")

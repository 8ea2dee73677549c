"""`mmtrain train`: prepare what is missing, then train; the same command again continues."""

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from mmtrain.config import Config, SweepConfig, UserError
from mmtrain.config.compose import compose
from mmtrain.track import closing_box
from mmtrain.train.budget import with_budget
from mmtrain.train.checkpoint import newest
from mmtrain.train.launch import check_batch, num_ranks
from mmtrain.train.run import check_run, open_run
from mmtrain.train.status import read_status
from mmtrain.train.supervise import FINISHED, STOPPED, USER, supervise

PREPARE = "prepare"
MANY = ("-m", "--multirun")


def main(argv: list[str]) -> int:
    """Compose, prepare artifacts, freeze the config and train; returns 1 when training failed.

    With `prepare` as the first word it stops before training, and the last line it prints is the run directory.
    """
    from mmtrain.verbs import sweep  # noqa: PLC0415
    from mmtrain.verbs.prepare import prepare  # noqa: PLC0415

    prepare_only = argv[:1] == [PREPARE]
    if set(MANY) & set(argv):
        words = [word for word in argv[prepare_only:] if word not in MANY]
        job = sweep.one_job(words)
        if job is None and prepare_only:
            raise UserError("`mmtrain train prepare` prepares one run; choose it by sweep.job=NUMBER, or leave out -m")
        if job is None:
            return sweep.grid(words)
        argv = [*argv[:prepare_only], *job.overrides]
    config = compose(argv[prepare_only:])
    if config.sweep.job is not None:
        raise UserError("sweep.job (set by a Slurm array) chooses a job of a grid; add -m and axes, or leave it out")
    config = replace(config, sweep=SweepConfig())
    if not prepare_only:  # else somebody else decides how many ranks there are
        check_batch(config, num_ranks(config))
    run_dir = Path(config.root) / config.name
    if any((run_dir / name).exists() for name in (sweep.SWEEP, sweep.SEARCH)):
        raise UserError(f"{run_dir} is the folder of a sweep, not of one run; choose another name=, or add -m")
    check_run(run_dir, config)
    artifacts = prepare(config)
    config = with_budget(config, artifacts)
    open_run(run_dir, config, artifacts, shlex.join(["mmtrain", "train", *argv]))
    if prepare_only:
        print(run_dir.resolve())
        return 0
    finished = newest(run_dir / "checkpoints")
    if finished is None or finished.step < config.train.steps:
        cause = supervise(run_dir, config)
        if cause != FINISHED:
            return _explain(cause, run_dir, config)
    folder = os.path.relpath(run_dir)
    places = {
        "checkpoints": f"{folder}/checkpoints",
        "metrics": f"{folder}/metrics.jsonl",
        "compute": f"{folder}/ledger.json",
        "next": f"mmtrain generate run={folder}; mmtrain report run={folder}",
    }
    closing_box(f"{config.name}: {config.train.steps} steps trained", places)
    return 0


def _explain(cause: str, run_dir: Path, config: Config) -> int:
    """Say how training ended before its last step; returns the exit code of the command."""
    checkpoints = os.path.relpath(run_dir / "checkpoints")
    if cause == STOPPED:
        status = read_status(run_dir)
        at = f" at step {status.step} of {config.train.steps}" if status else ""
        print(f"mmtrain: stopped{at}; saved in {checkpoints}; the same command goes on from there")
        return 0
    if cause == USER:
        raise UserError("training stopped (the reason is printed above); mend it and run the same command again")
    print(
        f"mmtrain: training ended: {cause} (what happened is printed above); the same command goes on from the last "
        f"checkpoint in {checkpoints}, and engine.restarts=N makes it do so by itself",
        file=sys.stderr,
    )
    return 1

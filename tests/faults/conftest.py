"""Prepared data, uninterrupted runs to compare with, and the table that docs/reliability.md shows."""

import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mmtrain.config.compose import compose
from mmtrain.train.run import open_run
from tests.faults.ranks import copy_run, run_to_end

STEPS, INTERVAL = 24, 8


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of the smoke experiment that was prepared and never started."""
    from mmtrain.verbs.prepare import prepare

    folder = tmp_path_factory.mktemp("faults")
    words = [f"root={folder}/runs", f"data_dir={folder}/data", "name=template", f"train.steps={STEPS}"]
    words += [f"train.checkpoint_every={INTERVAL}", "train.evaluate_every=8", "track.log_every=1"]
    config = compose(["experiment=smoke", *words])
    run = folder / "runs" / "template"
    open_run(run, config, prepare(config), "tests/faults")
    return run


@pytest.fixture(scope="session")
def straight(template: Path) -> Callable[..., Path]:
    """A finished, uninterrupted run of two ranks with the given settings; made once."""

    @cache
    def make(**settings: Any) -> Path:
        name = "-".join(["straight", *(f"{key}-{value}" for key, value in settings.items())])
        run = copy_run(template, name, **settings)
        run_to_end(run)
        return run

    return make


@pytest.fixture(scope="session")
def table() -> Iterator[Callable[..., None]]:
    """Adds a row to the table of faults, which is written to MMTRAIN_FAULT_REPORT if that is set."""
    rows: list[dict[str, Any]] = []

    def add(fault: str, promise: str, seen: str, recovery: float | None = None, lost: int | None = None) -> None:
        """recovery: seconds from the new start to the first step; lost: steps that were done again."""
        rows.append({"fault": fault, "promise": promise, "seen": seen, "recovery": recovery, "lost": lost})

    yield add
    if path := os.environ.get("MMTRAIN_FAULT_REPORT"):
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

"""Prepared data, and uninterrupted runs to compare with."""

from collections.abc import Callable
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

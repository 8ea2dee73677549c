"""The file of a W&B sweep says the same as the search, and its command is one that `mmtrain train` takes."""

import subprocess
from pathlib import Path

import optuna
import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config
from wandb.sdk.sweeps.scheduler.optuna import search_space_from_sweep_config

from mmtrain import cli
from mmtrain.config.compose import compose
from mmtrain.train.worker import first_run_id


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "sweep.yaml"
    assert cli.main(["sweep", "wandb", "sweep=lr_search", "experiment=shapes_tiny", "root=a b", f"out={path}"]) == 0
    return path


def test_wandb_reads_the_space_of_the_search(file: Path) -> None:
    content = load_sweep_config(str(file))
    assert content is not None
    float_, int_, choice = (
        getattr(optuna.distributions, f"{kind}Distribution") for kind in ("Float", "Int", "Categorical")
    )
    assert search_space_from_sweep_config(content["parameters"]) == {
        "optim.lr": float_(1e-3, 0.1, log=True),
        "optim.weight_decay": choice([0.0, 0.05, 0.2]),
        "optim.warmup_steps": int_(5, 40, step=5),
        "model.layers": int_(1, 4),
    }
    assert content["metric"] == {"name": "val/loss", "goal": "minimize"} and content["method"] == "bayes"
    assert content["early_terminate"]["type"] == "hyperband"


def test_what_an_agent_runs_is_a_command_of_mmtrain(file: Path, tmp_path: Path) -> None:
    values = {"optim.lr": 0.0123, "optim.weight_decay": 0.05, "optim.warmup_steps": 10, "model.layers": 3}
    macros = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    macros["env"] = ["/usr/bin/env"]  # as wandb_agent fills them in
    words: list[str] = []
    for word in create_sweep_command(yaml.safe_load(file.read_text())["command"]):
        words += macros[word[2:-1]] if word.startswith("${") else [word]
    (tmp_path / "mmtrain").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    (tmp_path / "mmtrain").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "WANDB_RUN_ID": "ab12cd34"}
    verb, *settings = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    config = compose(settings[:-1])
    assert verb == "train" and config.name == "ab12cd34" and config.root == "a b/lr_search"
    assert (config.optim.lr, config.optim.weight_decay, config.model.layers) == (0.0123, 0.05, 3)
    assert config.track.wandb == "online"


def test_a_run_of_an_agent_has_the_id_that_the_agent_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "ab12cd34")
    (tmp_path / "own").mkdir()
    assert first_run_id(tmp_path / "own") != "ab12cd34"  # left in the environment by something else
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert first_run_id(tmp_path) == "ab12cd34"

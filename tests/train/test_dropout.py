"""Dropout in the real loop: the masks of a step are the same whenever it is done, and there are none in evaluation."""

import shutil
from pathlib import Path

import pytest
import torch

from mmtrain.config import Config
from mmtrain.train.loop import seed_dropout
from mmtrain.train.token_learner import model_inputs
from tests.train import small_run


def configure(**model: object) -> Config:
    config = small_run.small_config(8, **({"dropout": 0.2, "zero_init_outputs": False} | model))
    config.train.checkpoint_every, config.train.evaluate_every = 4, 2
    return config


def losses(rows: list[dict], after: int = 0) -> list[tuple[float, float]]:
    return [(row["loss"], row.get("val_loss", 0.0)) for row in rows if row["step"] > after]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_resumed_run_draws_the_masks_that_the_straight_run_drew(checkpointing: bool, tmp_path: Path) -> None:
    config = configure(activation_checkpointing=checkpointing)
    straight = small_run.train(config, tmp_path / "straight", accumulation=2)
    saved = Path("checkpoints") / "step-00000004"
    shutil.copytree(tmp_path / "straight" / saved, tmp_path / "resumed" / saved)
    torch.manual_seed(99)
    resumed = small_run.train(config, tmp_path / "resumed", accumulation=2)
    assert losses(resumed) == losses(straight, after=4) and len(resumed) == 4
    without = small_run.train(configure(dropout=0.0), tmp_path / "without", accumulation=2)
    assert losses(without) != losses(straight)


def test_every_micro_batch_of_every_step_has_masks_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[tuple[int, ...]] = []
    monkeypatch.setattr("mmtrain.train.loop.seed_dropout", lambda *key: keys.append(key))
    config = configure()
    config.train.dry_run = False
    small_run.train(config, tmp_path, accumulation=2)
    assert keys == [(config.seed, step, 0, number) for step in range(8) for number in range(2)]
    small_run.train(configure(dropout=0.0), tmp_path / "without")
    assert len(keys) == 16


def test_evaluation_has_no_dropout_and_training_has_it_again(tmp_path: Path) -> None:
    config = configure()
    model = small_run.new_model(config)
    rows = small_run.train(config, tmp_path, model)
    assert model.training and [row["step"] for row in rows if "val_loss" in row] == [2, 4, 6, 8]
    batch, _ = small_run.FixedStream(config.stream).prepare(10**6)
    with torch.no_grad():
        sums = model.eval()(**model_inputs(batch, small_run.VOCABULARY, torch.device("cpu")))
    total, count = sums.by_modality.sum(0).tolist()
    assert rows[-1]["val_loss"] == pytest.approx(total / count, rel=1e-6)


def test_masks_depend_on_seed_step_rank_and_micro_batch_and_on_nothing_else() -> None:
    def draw(*key: int) -> list[float]:
        seed_dropout(*key)
        return torch.rand(4).tolist()

    keys = [(1, 2, 3, 4), (0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)]
    draws = [draw(*key) for key in keys]
    assert len({tuple(numbers) for numbers in draws}) == len(keys)
    assert [draw(*key) for key in reversed(keys)] == draws[::-1]

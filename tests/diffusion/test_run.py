"""The baseline through the command line: train, evaluate, generate, report, and what is refused."""

import json
from pathlib import Path

import pytest

from mmtrain.config import UserError
from mmtrain.config.compose import compose
from mmtrain.track import read_metrics
from mmtrain.verbs import evaluate, export, generate, report
from tests.e2e.conftest import mmtrain

SETTINGS = ("experiment=smoke", "retrieval=none", "model=dit_tiny", "model.layers=1", "model.width=32", "model.heads=2")
PLAIN = ("engine=ddp", "engine.dtype=fp32", "train.steps=3", "train.evaluate_every=3", "track.wandb=disabled")
WITHOUT_WORDS = ("task.num_captions=0", "task.num_infills=0")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks."""
    folder = tmp_path_factory.mktemp("diffusion")
    done = mmtrain("train", *SETTINGS, *PLAIN, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "smoke"


def test_a_run_is_evaluated_sampled_and_reported(run: Path) -> None:
    rows = read_metrics(run / "metrics.jsonl")
    assert all(row["loss"] == row["loss_image"] > 0 for row in rows if "loss" in row) and rows[-1]["val_loss"] > 0
    before = json.loads((run / "ledger.json").read_text())["flops"]
    assert min(before[book] for book in ("train_text", "train_image", "image_tokenizer_encode")) > 0
    alone = ("diffusion.sampling_steps=2", f"run={run}")
    assert evaluate.main(["task=shapes", "task.num_prompts=4", *WITHOUT_WORDS, *alone]) == 0
    table = json.loads((run / "evaluation-shapes.json").read_text())["results"]["pictures"]
    assert table["background"]["total"] == 4
    assert generate.main(["a red circle", "generate.num_samples=2", *alone]) == 0
    assert len(list((run / "samples").glob("image-step3-*/*-a-red-circle.png"))) == 2
    assert evaluate.main(["task=loss", *alone]) == 0
    measured = json.loads((run / "evaluation-loss.json").read_text())
    assert measured["image"] == pytest.approx(rows[-1]["val_loss"], rel=1e-4)
    assert report.main(list(alone)) == 0 and (run / "report.html").is_file()
    after = json.loads((run / "ledger.json").read_text())["flops"]
    assert after["evaluation"] > before["evaluation"] and after["sampling"] > before["sampling"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["generate.task=caption"], "draws pictures alone"), (["generate.best_of=2", "a"], "best_of")],
)
def test_what_a_diffusion_model_cannot_do(run: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        generate.main([*words, f"run={run}"])


def test_it_cannot_be_exported(run: Path) -> None:
    with pytest.raises(UserError, match="transformers has no model"):
        export.main([f"run={run}", f"out={run / 'exported'}"])


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("retrieval=hashed", "set retrieval=none"),
        ("image_tokenizer=vq", "use image_tokenizer=fsq"),
        ("model.ffn_width=100", "model.family=dit takes 0"),
        ("engine.stage=auto", "set a stage from 0 to 3"),
        ("diffusion.patch_size=3", "does not divide the 4 latent cells"),
        ("diffusion.sampler=ddim", "use flow_euler"),
    ],
)
def test_settings_that_do_not_fit(setting: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        compose([*SETTINGS, setting])

"""The baseline in the real loop: it learns, it sees what a token model sees, and a resumed run is the same run."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mmtrain.config import Config, UserError
from mmtrain.stream.batch import interleave
from mmtrain.train.checkpoint import latest_checkpoint, load_parameters
from tests.diffusion.conftest import CELLS, Corpus, diffusion_config
from tests.train import small_run


def run(corpus: Corpus, folder: Path, config: Config, accumulation: int = 1) -> list[dict[str, float]]:
    """The log rows of what a run in `folder`, new or continued, still has to do."""
    learner = corpus.learner(config)
    network = learner.new_model()
    network.initialize(config.seed)
    held_out = corpus.stream(config, split="validation").prepare(0)
    return small_run.train(config, folder, network, accumulation, learner, corpus.stream(config), held_out)


@pytest.mark.parametrize("objective", ["rectified_flow", "ddpm"])
def test_the_loss_falls(corpus: Corpus, tmp_path: Path, objective: str) -> None:
    config = diffusion_config(60)
    config.diffusion.objective, config.optim.lr = objective, 5e-3
    rows = run(corpus, tmp_path / objective, config)
    losses = [row["loss_image"] for row in rows]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    assert rows[-1]["val_loss"] < losses[0]


def test_a_step_holds_the_documents_of_the_token_models_step(corpus: Corpus) -> None:
    config = diffusion_config()
    config.diffusion.caption_dropout = 0.0
    ours, theirs = corpus.stream(config), corpus.stream(config, with_origin=False)
    learner = corpus.learner(config)
    for step in (0, 3, 12):  # in several epochs
        batch, counts = ours.prepare(step)
        expected = theirs.batch(step)
        for name, tensor in expected.items():
            assert torch.equal(batch[name], tensor)  # type: ignore[literal-required]
        inputs, sums = learner.inputs(batch, counts, "train")
        assert sums[0] == len(inputs["caption"]) == counts.total("sequences")
        assert "origin" not in expected  # the stream of a token model is as it was


def test_captions_and_latents_belong_to_the_documents_of_the_row(corpus: Corpus) -> None:
    config = diffusion_config()
    learner = corpus.learner(config)
    config.diffusion.caption_dropout = 0.0
    batch, counts = corpus.stream(config).prepare(5)
    inputs, _ = learner.inputs(batch, counts, "train")
    codes = [int(row.max()) - small_run.VOCABULARY.image_start for row in _rows(batch)]
    assert inputs["caption"][:, 0].tolist() == codes  # the picture that the row shows is the caption's first id
    same = {}
    for code, latent in zip(codes, inputs["latents"], strict=True):
        assert torch.equal(same.setdefault(code, latent), latent)
    assert inputs["loss_weight"].sum() == CELLS * len(codes)


def _rows(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    v = small_run.VOCABULARY
    found = []
    for tokens, document_ids in zip(batch["tokens"], batch["document"], strict=True):
        for number in range(int(document_ids.max()) + 1):
            of_document = tokens[document_ids == number]
            found.append(of_document[(of_document >= v.image_start) & (of_document < v.image_end)])
    return found


def test_what_is_drawn_depends_on_the_document_alone(corpus: Corpus) -> None:
    config = diffusion_config()
    learner, stream = corpus.learner(config), corpus.stream(config)
    whole, _ = learner.inputs(*stream.prepare(2), "train")
    halves = [learner.inputs(*stream.prepare(2, rank, 2), "train")[0] for rank in range(2)]
    for name in ("noise", "level", "latents", "length"):
        expected = sorted(map(repr, whole[name].tolist()))
        assert expected == sorted(repr(x) for half in halves for x in half[name].tolist())
    again, _ = learner.inputs(*corpus.stream(config).prepare(2), "train")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    parts = interleave([stream.prepare(2, part, 2) for part in range(2)])  # as stream.workers make them
    assert torch.equal(learner.inputs(*parts, "train")[0]["noise"], whole["noise"])


def test_captions_are_dropped_as_often_as_asked(corpus: Corpus) -> None:
    config = diffusion_config()
    config.diffusion.caption_dropout = 0.3
    learner, stream = corpus.learner(config), corpus.stream(config)
    dropped = [
        learner.inputs(*stream.prepare(step), "train")[0]["caption"][:, 0] == small_run.VOCABULARY.text_size
        for step in range(40)
    ]
    assert float(torch.cat(dropped).float().mean()) == pytest.approx(0.3, abs=0.05)


def test_a_resumed_run_is_the_run_that_was_never_stopped(corpus: Corpus, tmp_path: Path) -> None:
    def config(steps: int) -> Config:
        made = diffusion_config(steps)
        made.optim.decay, made.optim.warmup_steps = "constant", 0
        return made

    straight = run(corpus, tmp_path / "straight", config(6))
    parts = run(corpus, tmp_path / "parts", config(3)) + run(corpus, tmp_path / "parts", config(6))
    assert [row["loss"] for row in parts] == [row["loss"] for row in straight]
    weights = [load_parameters(latest_checkpoint(tmp_path / name / "checkpoints")[0]) for name in ("straight", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_micro_batches_change_nothing(corpus: Corpus, tmp_path: Path) -> None:
    config = diffusion_config(3)
    config.track.log_every = 3
    (whole,), (cut,) = (run(corpus, tmp_path / f"{n}", config, n) for n in (1, 4))
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    learner, stream = corpus.learner(config), corpus.stream(config)
    steps = [(learner.inputs(*stream.prepare(step), "train")[1], stream.prepare(step)[1]) for step in range(3)]
    flops = sum(learner.flops(sums, counts.tokens, counts.rows)[0].model_causal for sums, counts in steps)
    assert cut["flops_total"] == whole["flops_total"] == flops


def test_flops_are_shared_between_pictures_and_captions(corpus: Corpus) -> None:
    config = diffusion_config()
    learner = corpus.learner(config)
    batch, counts = corpus.stream(config).prepare(0)
    _, sums = learner.inputs(batch, counts, "train")
    flops, by_kind = learner.flops(sums, counts.tokens, counts.rows)
    assert sum(by_kind.values()) == flops.model_causal < flops.hardware  # hardware pays for padded captions
    assert min(by_kind.values()) > 0


def test_too_long_a_document_is_refused(corpus: Corpus) -> None:
    config = diffusion_config()
    config.stream.sequence_length = 14
    with pytest.raises(UserError, match="whole documents; set it to 15 or more"):
        corpus.learner(config)

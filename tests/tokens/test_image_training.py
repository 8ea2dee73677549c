import json

import numpy as np
import pytest
from PIL import Image

from mmtrain.config import ImageTokenizerConfig, UserError
from mmtrain.tokens import ImageTokenizer, train_image_tokenizer


def scenes(count, seed):
    """Flat squares on flat backgrounds, 16x16."""
    rng = np.random.default_rng(seed)
    images = np.empty((count, 16, 16, 3), np.uint8)
    for image in images:
        image[:] = rng.integers(0, 256, 3)
        top, left = rng.integers(0, 10, 2)
        image[top : top + 6, left : left + 6] = rng.integers(0, 256, 3)
    return images


def train(out, steps, **changes):
    config = ImageTokenizerConfig(
        **({"width": 8, "levels": [8, 8, 8], "steps": steps, "batch_size": 16, "lr": 3e-3} | changes)
    )
    seen = []
    metrics = train_image_tokenizer(
        scenes(200, 0), scenes(20, 1), config, out, lambda step, row: seen.append((step, row))
    )
    return metrics, seen


@pytest.mark.parametrize("quantizer", ["fsq", "vq", "lfq"])
def test_training_improves_reconstructions(tmp_path, quantizer):
    changes = {"quantizer": quantizer, "codebook_size": 256, "latent_dim": 8}
    before, _ = train(tmp_path / "a", 1, **changes)
    after, seen = train(tmp_path / "b", 120, **changes)
    assert after["psnr"] > before["psnr"] + 2
    assert seen[-1][0] == 120 and seen[-1][1]["loss"] < seen[0][1]["loss"]


def test_everything_is_written_and_deterministic(tmp_path):
    metrics, _ = train(tmp_path / "a", 3)
    assert json.loads((tmp_path / "a" / "metrics.json").read_text()) == metrics
    quality = {"psnr", "ssim", "codebook_used", "codebook_size", "codebook_perplexity", "held_out"}
    assert set(metrics) == quality | {"steps", "seconds", "images", "flops"}
    tokenizer = ImageTokenizer.load(tmp_path / "a")
    assert metrics["flops"] == tokenizer.train_flops_per_image * 16 * 3
    with Image.open(tmp_path / "a" / "reconstructions.png") as grid:
        assert grid.size == (12 * 128, 2 * 128)
    train(tmp_path / "b", 3)
    assert ImageTokenizer.load(tmp_path / "b").fingerprint == tokenizer.fingerprint
    train(tmp_path / "c", 3, seed=1)
    assert ImageTokenizer.load(tmp_path / "c").fingerprint != tokenizer.fingerprint


def test_no_pictures_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="held-out"):
        train_image_tokenizer(scenes(4, 0), scenes(0, 0), ImageTokenizerConfig(), tmp_path)

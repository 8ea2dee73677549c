"""The loss curves of 200 steps of a small model of each family, as they were stored in `golden/`.

Where numerics were meant to change, `python -m tests.models.test_golden` stores new ones; say why in the commit.
Rounding differs between processors and versions of torch, and training amplifies it, most of all at the kinks of ReLU
(at a learning rate of 1e-3, 1e-7 in the weights became 2e-4 in cm3leon's loss, at 3e-4 up to 7e-5, and 5e-7 with GELU).
Short rows and a small learning rate keep it far below the tolerance, which a test shows.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train import small_run

GOLDEN = Path(__file__).parent / "golden"
STEPS = 200
FAMILIES = {
    "cm3leon": {},
    "llama": {"family": "llama", "kv_heads": 2},
    "chameleon": {"family": "chameleon", "z_loss": 1e-5, "picture_grid": 4},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Such small products are slower on more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def curve(family: str, perturbation: float = 0.0) -> list[float]:
    """The training loss of every step; perturbation: relative normal noise on all initial weights."""
    config = small_run.small_config(STEPS, **FAMILIES[family])
    config.optim.lr = 1e-4
    model = small_run.new_model(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data *= 1 + perturbation * torch.randn(parameter.shape, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        return [row["loss"] for row in small_run.train(config, Path(folder), model)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_curve_is_the_stored_one_and_the_same_twice(family: str) -> None:
    stored = json.loads((GOLDEN / f"{family}.json").read_text())
    losses = curve(family)
    assert len(losses) == len(stored) == STEPS and stored[0] - stored[-1] > 0.4
    np.testing.assert_allclose(losses, stored, rtol=0, atol=1e-4)
    assert curve(family) == losses


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_errors_move_the_curve_far_less_than_the_tolerance(family: str) -> None:
    stored = json.loads((GOLDEN / f"{family}.json").read_text())
    moved = np.abs(np.subtract(curve(family, 1e-7), stored))
    assert 0 < moved.max() < 1e-5


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    for name in FAMILIES:
        losses = curve(name)
        (GOLDEN / f"{name}.json").write_text(json.dumps(losses, indent=0) + "\n")
        moved = np.abs(np.subtract(curve(name, 1e-7), losses)).max()
        print(f"{name}: {losses[0]:.6f} to {losses[-1]:.6f}; 1e-7 in the weights moves it by {moved:.1e}")

"""The learning rate of every step."""

import pytest

from mmtrain.config import OptimConfig
from mmtrain.train.schedule import learning_rate


def rates(total: int, **changes: object) -> list[float]:
    config = OptimConfig(**({"lr": 1.0, "warmup_steps": 4, "final_fraction": 0.1} | changes))
    return [learning_rate(step, total, config) for step in range(total)]


def test_linear_warm_up_then_linear_decay_to_the_final_fraction() -> None:
    found = rates(14)
    assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert found[-1] == pytest.approx(0.1)
    steps = [b - a for a, b in zip(found[4:], found[5:], strict=False)]
    assert steps == pytest.approx([-0.1] * 9)


def test_cosine_is_half_way_in_the_middle() -> None:
    found = rates(15, decay="cosine")
    assert (found[4], found[9], found[-1]) == pytest.approx((1.0, 0.55, 0.1))
    assert found[4:] == sorted(found[4:], reverse=True)


def test_constant_stays() -> None:
    assert set(rates(20, decay="constant")[4:]) == {1.0}


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_no_warm_up_and_runs_shorter_than_it_are_legal(decay: str) -> None:
    assert rates(1, warmup_steps=0, decay=decay) == [1.0]
    assert rates(2, decay=decay) == [0.25, 0.5]

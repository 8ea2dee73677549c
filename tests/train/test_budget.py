"""A budget in FLOPs becomes the nearest number of steps."""

import pytest

from mmtrain.train.budget import steps_for


@pytest.mark.parametrize(
    ("budget", "steps"),
    [(1, 1), (24, 2), (26, 2), (44, 2), (46, 3), (60, 3), (70, 3), (71, 4), (6000, 300)],
)
def test_the_nearest_number_of_steps(budget: float, steps: int) -> None:
    assert steps_for(budget, [10, 20, 30]) == steps

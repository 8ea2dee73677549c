"""Intervals of an ablation: they hold what is there, and pairing takes out what seeds and documents share."""

import numpy as np

from mmtrain.evaluate import Measured, compare_arms, draw_differences


def arms(effect: float, seed: int = 0) -> dict[str, Measured]:
    """Three seeds, 200 documents of very unequal difficulty, and an arm that differs by `effect` per token."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(10, 40, (1, 200)).repeat(3, axis=0).astype(float)
    hard = rng.normal(3.0, 1.0, (1, 200)) + rng.normal(0.0, 0.05, (3, 1))
    other = hard + effect + rng.normal(0.0, 0.1, (3, 200))
    return {"none": Measured(hard * counts, counts), "other": Measured(other * counts, counts)}


def test_a_paired_difference_is_found_where_means_overlap() -> None:
    found = compare_arms(arms(0.05), "none")
    (none, nothing), (other, difference) = found["none"], found["other"]
    assert nothing is None and difference is not None
    assert none.low < other.value < none.high
    assert 0.0 < difference.low < 0.05 < difference.high < 0.1


def test_nothing_is_found_where_there_is_nothing() -> None:
    differences = [compare_arms(arms(0.0, seed), "none")["other"][1] for seed in range(6)]
    assert sum(d is not None and d.low <= 0.0 <= d.high for d in differences) >= 5


def test_the_figure_has_a_panel_per_title() -> None:
    difference = compare_arms(arms(0.05), "none")["other"][1]
    assert difference is not None
    one, two = (draw_differences({title: {"loss": {"other": difference}} for title in titles}, "none")
                for titles in ("a", "ab"))  # fmt: skip
    width = [int.from_bytes(figure[16:20], "big") for figure in (one, two)]
    assert width[1] == 2 * width[0]

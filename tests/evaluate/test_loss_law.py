"""The fit of L(N, D) finds a planted law, its interval holds it, and it predicts runs that it has not seen."""

import numpy as np
import pytest

from mmtrain.config import UserError
from mmtrain.evaluate.loss_law import Law, Point, budgets, fit_law, held_out

PLANTED = Law(E=0.8, A=30.0, B=60.0, alpha=0.4, beta=0.35, per_token=6.5)
SIZES = (20_000, 40_000, 80_000, 160_000, 320_000)


def ladder(
    noise: float, sizes: tuple[int, ...] = SIZES, flops: tuple[float, ...] = (1e11, 4e11, 1.6e12)
) -> list[Point]:
    stream = np.random.default_rng(1)
    points = []
    for size in sizes:
        for budget in flops:
            tokens = int(budget / (PLANTED.per_token * size))
            loss = PLANTED.loss(size, tokens) * np.exp(stream.normal(0, noise))
            points.append(Point(f"{size}-{budget:.0e}", size, tokens, int(budget), {"val_loss": float(loss)}))
    return points


def test_a_law_without_noise_is_found() -> None:
    law = fit_law(ladder(0.0), "val_loss", replicates=0).law
    for name in ("E", "alpha", "beta", "per_token"):
        assert getattr(law, name) == pytest.approx(getattr(PLANTED, name), rel=0.01), name
    assert law.optimal(1e13)[0] == pytest.approx(PLANTED.optimal(1e13)[0], rel=0.02)


def test_the_optimum_is_one() -> None:
    size, tokens = PLANTED.optimal(1e12)
    assert size * tokens * PLANTED.per_token == pytest.approx(1e12)
    around = [PLANTED.loss(size * factor, tokens / factor) for factor in (0.9, 1.0, 1.1)]
    assert min(around) == around[1]


def test_one_run_that_went_wrong_does_not_bend_the_law() -> None:
    points = ladder(0.001)
    bad = Point(*[getattr(points[7], key) for key in ("name", "parameters", "tokens", "flops")], {"val_loss": 9.0})
    law = fit_law([*points[:7], bad, *points[8:]], "val_loss", replicates=0).law
    others = [point for point in points if point.name != bad.name]
    assert max(abs(law.loss(p.parameters, p.tokens) / p.losses["val_loss"] - 1) for p in others) < 0.01


def test_intervals_and_a_held_out_budget() -> None:
    points = ladder(0.003)
    fit = fit_law(points, "val_loss", replicates=30)
    alpha = fit.estimate(lambda law: law.alpha)
    assert alpha.low < PLANTED.alpha < alpha.high and alpha.low < alpha.value < alpha.high
    predicted = held_out(points, "val_loss")
    assert predicted is not None and [point.parameters for point, _ in predicted] == list(SIZES)
    assert {point.flops for point, _ in predicted} == {budgets(points)[-1][0].flops}
    assert max(abs(value / point.losses["val_loss"] - 1) for point, value in predicted) < 0.02


def test_too_few_runs_are_refused_in_one_sentence() -> None:
    few = ladder(0.0, sizes=SIZES[:2])
    with pytest.raises(UserError, match="6 runs of 2 sizes on 3 budgets are too few for L"):
        fit_law(few, "val_loss")
    assert held_out(ladder(0.0, flops=(1e11, 4e11)), "val_loss") is None  # one budget is left

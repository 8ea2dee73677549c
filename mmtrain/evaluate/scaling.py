"""Quality against training compute of two or more families: envelopes, fits, differences and crossings, bootstrapped.

A trial is one trained model with its value per unit (a prompt, a block of pictures), the same units for all. Trials of
one family, one setting (size, learning rate, ...) and one budget that differ by their seed are a cell. The envelope of
a family is, budget by budget, its best cell. A fit is link(envelope) = a + b log10 FLOPs, by least squares.

Each bootstrap replicate draws the units anew, one draw for all trials, and adds to each trial a deviation drawn from
those of all trials of its family from the means of their cells; then cells are compared and fits made anew, so that
the choice of the best size is part of what varies. Deviations are scaled by sqrt(n / (n - 1)), for n seeds as for n
units. Seeds carry some of the luck of drawing, too, so the intervals are rather too wide than too narrow.

Legend: R replicates (the first one is the sample itself), T trials, U units, B budgets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmtrain.config.randomness import random_stream

REPLICATES = 4000
LEVEL = (2.5, 97.5)
# Trials are of one budget when their FLOPs differ by less; budgets of a study are factors apart.
SAME_BUDGET = 1.25
ESTABLISHED = 0.95


@dataclass(frozen=True)
class Trial:
    """One trained model. flops: of its training. values: (U,) whose mean is its quality."""

    family: str
    setting: str
    seed: int
    flops: float
    values: np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Cell:
    """Trials that differ by their seed only."""

    family: str
    setting: str
    budget: int
    flops: float
    seeds: int
    quality: Estimate


@dataclass(frozen=True)
class Fit:
    """link(quality) = intercept + slope * log10 FLOPs; curve: (FLOPs, quality) along the range of its budgets."""

    intercept: Estimate
    slope: Estimate
    curve: tuple[tuple[float, Estimate], ...]


@dataclass(frozen=True)
class Crossing:
    """Where two fits cross within the budgets that both have.

    share: of the replicates in which they do. flops: where, over those; None when the share is too small, or the
    sample itself has none.
    """

    share: float
    flops: Estimate | None


@dataclass(frozen=True)
class Scaling:
    """Of `families`, the first against the second: differences by budget, None where one of them has no trial.

    best: by family and budget the setting on its envelope. Fits need two budgets, a crossing two that both have.
    """

    families: tuple[str, ...]
    budgets: tuple[float, ...]
    cells: tuple[Cell, ...]
    envelopes: dict[str, dict[int, Estimate]]
    best: dict[str, dict[int, str]]
    differences: dict[int, Estimate]
    fits: dict[str, Fit]
    crossing: Crossing | None
    most_seeds: int
    num_units: int


@dataclass(frozen=True)
class Link:
    """A monotone scale on which quality is a straight line in log10 FLOPs."""

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


def logit_link(num_units: int) -> Link:
    """For shares: values are kept half a unit away from 0 and 1."""
    edge = 0.5 / num_units

    def forward(p: np.ndarray) -> np.ndarray:
        p = np.clip(p, edge, 1 - edge)
        return np.log(p / (1 - p))

    return Link("logit", forward, lambda x: 1 / (1 + np.exp(-x)))


IDENTITY = Link("identity", lambda x: x, lambda x: x)


def measure_scaling(
    trials: Sequence[Trial], link: Link, higher_is_better: bool = True, seed: int = 0, replicates: int = REPLICATES
) -> Scaling:
    """Compare the families of `trials`. Raises ValueError without trials, or when they have different units."""
    if not trials or len({len(trial.values) for trial in trials}) != 1:
        raise ValueError("trials to compare need values of the same units")
    families = tuple(sorted({trial.family for trial in trials}))
    budgets, budget_of = group_budgets([trial.flops for trial in trials])
    quality_RT = _replicate(trials, budget_of, random_stream(seed, "scaling"), replicates)

    cells: list[Cell] = []
    cell_R: dict[tuple[str, int, str], np.ndarray] = {}
    flops_of: dict[tuple[str, int, str], float] = {}
    for key in sorted({(t.family, b, t.setting) for t, b in zip(trials, budget_of, strict=True)}):
        family, budget, setting = key
        members = [i for i, t in enumerate(trials) if (t.family, budget_of[i], t.setting) == key]
        cell_R[key] = quality_RT[:, members].mean(axis=1)
        flops_of[key] = float(np.mean([trials[i].flops for i in members]))
        cells.append(Cell(family, setting, budget, flops_of[key], len(members), _estimate(cell_R[key])))

    envelope_R: dict[str, dict[int, np.ndarray]] = {}
    best: dict[str, dict[int, str]] = {}
    x: dict[str, dict[int, float]] = {}
    for family in families:
        envelope_R[family], best[family], x[family] = {}, {}, {}
        for budget in sorted({b for f, b, _ in cell_R if f == family}):
            keys = [key for key in cell_R if key[:2] == (family, budget)]
            stacked = np.stack([cell_R[key] for key in keys])
            envelope_R[family][budget] = stacked.max(axis=0) if higher_is_better else stacked.min(axis=0)
            at_best = keys[int(stacked[:, 0].argmax() if higher_is_better else stacked[:, 0].argmin())]
            best[family][budget] = at_best[2]
            x[family][budget] = float(np.log10(np.mean([flops_of[key] for key in keys])))

    coefficients = {
        family: _fit(list(x[family].values()), link.forward(np.stack(list(envelope_R[family].values()))))
        for family in families
        if len(x[family]) > 1
    }
    differences: dict[int, Estimate] = {}
    crossing = None
    if len(families) > 1:
        one, two = families[:2]
        common = sorted(envelope_R[one].keys() & envelope_R[two].keys())
        differences = {budget: _estimate(envelope_R[one][budget] - envelope_R[two][budget]) for budget in common}
        if len(common) > 1:
            ends = [min(x[one][common[0]], x[two][common[0]]), max(x[one][common[-1]], x[two][common[-1]])]
            crossing = _crossing(coefficients[one], coefficients[two], ends[0], ends[1])
    return Scaling(
        families=families,
        budgets=budgets,
        cells=tuple(cells),
        envelopes={f: {b: _estimate(values) for b, values in envelope_R[f].items()} for f in families},
        best=best,
        differences=differences,
        fits={f: _described(c, list(x[f].values()), link) for f, c in coefficients.items()},
        crossing=crossing,
        most_seeds=max(cell.seeds for cell in cells),
        num_units=len(trials[0].values),
    )


def group_budgets(flops: Sequence[float]) -> tuple[tuple[float, ...], list[int]]:
    """The budgets (geometric means) by rising FLOPs, and that of each trial."""
    order = np.argsort(flops, kind="stable")
    groups: list[list[int]] = []
    for i in order.tolist():
        if not groups or flops[i] > SAME_BUDGET * flops[groups[-1][0]]:
            groups.append([])
        groups[-1].append(i)
    of_trial = {i: number for number, group in enumerate(groups) for i in group}
    means = tuple(float(np.exp(np.mean(np.log([flops[i] for i in group])))) for group in groups)
    return means, [of_trial[i] for i in range(len(flops))]


def _replicate(
    trials: Sequence[Trial], budget_of: Sequence[int], rng: np.random.Generator, replicates: int
) -> np.ndarray:
    """(R, T) quality of each trial, row 0 as measured."""
    values_TU = np.stack([trial.values for trial in trials]).astype(np.float64)
    num_units = values_TU.shape[1]
    mean_T = values_TU.mean(axis=1)
    counts_RU = rng.multinomial(num_units, np.full(num_units, 1 / num_units), size=replicates)
    counts_RU[0] = 1
    scale = np.sqrt(num_units / max(1, num_units - 1))
    quality_RT = mean_T + scale * (counts_RU / num_units - 1 / num_units) @ (values_TU - mean_T[:, None]).T
    for family in {trial.family for trial in trials}:
        members = [i for i, trial in enumerate(trials) if trial.family == family]
        deviations = []
        for key in {(trials[i].setting, budget_of[i]) for i in members}:
            cell = [i for i in members if (trials[i].setting, budget_of[i]) == key]
            n = len(cell)
            if n > 1:
                deviations += list((mean_T[cell] - mean_T[cell].mean()) * np.sqrt(n / (n - 1)))
        if deviations:
            drawn = rng.choice(np.array(deviations), size=(replicates, len(members)))
            drawn[0] = 0.0
            quality_RT[:, members] += drawn
    return quality_RT


def _fit(x_B: Sequence[float], y_BR: np.ndarray) -> np.ndarray:
    """(2, R) intercept and slope of each replicate."""
    design = np.stack([np.ones(len(x_B)), np.array(x_B)], axis=1)
    return np.linalg.lstsq(design, y_BR, rcond=None)[0]


def _crossing(one_2R: np.ndarray, two_2R: np.ndarray, low: float, high: float) -> Crossing:
    a, b = one_2R - two_2R
    with np.errstate(divide="ignore", invalid="ignore"):
        x_R = -a / b
    inside = np.isfinite(x_R) & (x_R >= low) & (x_R <= high)
    share = float(inside.mean())
    if not inside[0] or share < ESTABLISHED:
        return Crossing(share, None)
    ends = np.percentile(x_R[inside], LEVEL)
    return Crossing(share, Estimate(float(10 ** x_R[0]), float(10 ** ends[0]), float(10 ** ends[1])))


def _described(coefficients_2R: np.ndarray, x_B: Sequence[float], link: Link) -> Fit:
    intercept, slope = coefficients_2R
    curve = [
        (float(10**x), _estimate(link.inverse(intercept + slope * x)))
        for x in np.linspace(min(x_B), max(x_B), 25).tolist()
    ]
    return Fit(_estimate(intercept), _estimate(slope), tuple(curve))


def _estimate(values_R: np.ndarray) -> Estimate:
    low, high = np.percentile(values_R, LEVEL)
    return Estimate(float(values_R[0]), float(low), float(high))

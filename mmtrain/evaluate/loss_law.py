"""Loss as a function of parameters and tokens: L(N, D) = E + A / N^alpha + B / D^beta, fitted and bootstrapped.

Hoffmann et al. 2022 (Chinchilla), approach 3: the Huber loss (delta 1e-3) of log L against the log-sum-exp of the three
terms, minimized by L-BFGS from a grid of starts. Here a start is a pair of exponents; E, A and B of it are those of
least squares, none below zero. Logarithms of N and D are taken about their means, so that A and alpha, B and beta are
not nearly one parameter.

N: parameters of matrix products, those of the 6ND rule (`flops.matmul_parameters`: output head included, embedding
look-up not). D: tokens trained on, padding excluded, repeated epochs included. C: the ledger's training_total.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmtrain.config import UserError
from mmtrain.config.randomness import random_stream
from mmtrain.evaluate.scaling import LEVEL, SAME_BUDGET, Estimate

DELTA = 1e-3
REPLICATES = 200
EXPONENTS = (0.15, 0.3, 0.5, 0.8, 1.2)
LOWEST, HIGHEST = 0.01, 4.0  # exponents
FEWEST_RUNS, FEWEST_SIZES, FEWEST_BUDGETS = 6, 3, 2


@dataclass(frozen=True)
class Point:
    """A trained model: its size, N parameters, D tokens, C FLOPs, and its losses by name."""

    name: str
    parameters: int
    tokens: int
    flops: int
    losses: dict[str, float]


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta, and C = per_token x N x D."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    per_token: float
    """FLOPs of a token and parameter: 6, and the scores of attention."""

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """Predicted loss; arrays allowed."""
        return self.E + self.A / np.power(parameters, self.alpha) + self.B / np.power(tokens, self.beta)

    def optimal(self, flops: Any) -> tuple[Any, Any]:
        """(N, D) of the smallest loss at a budget (Hoffmann et al. 2022, equation 4)."""
        balance = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        work = np.asarray(flops) / self.per_token
        parameters = balance * work ** (self.beta / (self.alpha + self.beta))
        return parameters, work / parameters


@dataclass(frozen=True)
class LawFit:
    """A law with those of bootstrap replicates, which draw the runs anew."""

    law: Law
    replicates: tuple[Law, ...]

    def estimate(self, value: Any) -> Estimate:
        """`value`, a function of a law, with its 95 % interval."""
        low, high = np.percentile([value(law) for law in self.replicates], LEVEL)
        return Estimate(float(value(self.law)), float(low), float(high))


def budgets(points: Sequence[Point]) -> list[list[Point]]:
    """Runs of equal FLOPs together, by rising budget, each by rising size."""
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda point: point.flops):
        if groups and point.flops <= SAME_BUDGET * groups[-1][0].flops:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [sorted(group, key=lambda point: point.parameters) for group in groups]


def fit_law(points: Sequence[Point], loss: str, replicates: int = REPLICATES) -> LawFit:
    """Fit the loss of that name. Raises UserError where the runs are too few to tell five numbers apart."""
    shape = _shape(points)
    if any(count < least for count, least in zip(shape, (FEWEST_RUNS, FEWEST_SIZES, FEWEST_BUDGETS), strict=True)):
        raise UserError(
            f"{shape[0]} runs of {shape[1]} sizes on {shape[2]} budgets are too few for L(N, D), which has five "
            f"numbers; train at least {FEWEST_RUNS} runs of {FEWEST_SIZES} sizes on {FEWEST_BUDGETS} budgets"
        )
    grid = [(alpha, beta) for alpha in EXPONENTS for beta in EXPONENTS]
    law = _fit(points, loss, grid)
    stream = random_stream(0, "loss_law", loss)
    found: list[Law] = []
    while len(found) < replicates:
        drawn = [points[int(i)] for i in stream.integers(0, len(points), len(points))]
        distinct = _shape(list({point.name: point for point in drawn}.values()))
        if distinct[0] >= FEWEST_RUNS and distinct[1] >= FEWEST_SIZES and distinct[2] >= FEWEST_BUDGETS:
            found.append(_fit(drawn, loss, [(law.alpha, law.beta)]))
    return LawFit(law, tuple(found))


def _shape(points: Sequence[Point]) -> tuple[int, int, int]:
    """Runs, sizes, budgets."""
    return len(points), len({point.parameters for point in points}), len(budgets(points))


def held_out(points: Sequence[Point], loss: str) -> list[tuple[Point, float]] | None:
    """The runs of the largest budget, by size, each with the loss that the runs of the other budgets predict.

    None where those are too few.
    """
    *rest, largest = budgets(points)
    known = [point for group in rest for point in group]
    try:
        law = fit_law(known, loss, replicates=0).law
    except UserError:
        return None
    return [(point, float(law.loss(point.parameters, point.tokens))) for point in largest]


def _fit(points: Sequence[Point], loss: str, starts: Sequence[tuple[float, float]]) -> Law:
    from scipy.optimize import minimize, nnls

    log_n, log_d = np.log([p.parameters for p in points]), np.log([p.tokens for p in points])
    losses = np.array([p.losses[loss] for p in points])
    x, y, target = log_n - log_n.mean(), log_d - log_d.mean(), np.log(losses)

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        a, b, e, alpha, beta = theta
        terms = np.stack([a - alpha * x, b - beta * y, np.full_like(x, e)])
        top = terms.max(axis=0)
        total = np.exp(terms - top).sum(axis=0)
        residual = top + np.log(total) - target
        share = np.exp(terms - top) / total
        slope = np.clip(residual, -DELTA, DELTA)
        value = np.where(np.abs(residual) <= DELTA, residual**2 / 2, DELTA * (np.abs(residual) - DELTA / 2))
        by_term = share * slope
        gradient = np.array([*by_term.sum(axis=1), -(by_term[0] * x).sum(), -(by_term[1] * y).sum()])
        # In units of delta^2: L-BFGS would stop at once where all is small.
        return float(value.sum()) / DELTA**2, gradient / DELTA**2

    least = float(np.log(losses.min())) - 12  # a term that small is none
    bounds = [(least, None), (least, None), (least, None), (LOWEST, HIGHEST), (LOWEST, HIGHEST)]
    best: Any = None
    for alpha, beta in starts:
        design = np.stack([np.exp(-alpha * x), np.exp(-beta * y), np.ones_like(x)], axis=1) / losses[:, None]
        coefficients = np.maximum(nnls(design, np.ones_like(x))[0], 1e-3 * losses.min())
        start = [*np.log(coefficients), alpha, beta]
        options = {"maxiter": 500, "ftol": 1e-11, "gtol": 1e-8}
        found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        if best is None or found.fun < best.fun:
            best = found
    a, b, e, alpha, beta = (float(value) for value in best.x)
    per_token = float(np.median([p.flops / (p.parameters * p.tokens) for p in points]))
    A, B = np.exp(a + alpha * log_n.mean()), np.exp(b + beta * log_d.mean())
    return Law(float(np.exp(e)), float(A), float(B), alpha, beta, per_token)

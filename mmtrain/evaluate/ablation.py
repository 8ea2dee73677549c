"""Arms of an ablation against each other: means over seeds, and intervals that know of seeds and of documents.

S seeds, N held-out documents, which all runs share, D draws of the bootstrap.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mmtrain.config.randomness import random_stream

DRAWS = 10_000
DRAWN_AT_ONCE = 500
INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Measured:
    """One quantity of one arm: sums (S, N) and counts (S, N) float64, whose ratio is what is reported.

    Nats and targets of each document, or right answers and questions.
    """

    sums: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def compare_arms(arms: Mapping[str, Measured], baseline: str) -> dict[str, tuple[Estimate, Estimate | None]]:
    """For each arm its mean, and its difference from the baseline (None for that itself).

    Intervals are percentiles of a bootstrap over seeds and over documents, both drawn anew in every draw and the same
    ones for all arms: what seeds, and documents, have in common cancels in the difference. A seed is its own row in
    all arms. Raises ValueError where arms have other shapes.
    """
    if len({measured.sums.shape for measured in arms.values()}) != 1:
        raise ValueError("the arms of an ablation have the same seeds and documents")
    seeds, documents = arms[baseline].sums.shape
    stream = random_stream("bootstrap", seeds, documents)
    draws: dict[str, list[np.ndarray]] = {name: [] for name in arms}
    for _ in range(0, DRAWS, DRAWN_AT_ONCE):
        of_seeds = stream.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWN_AT_ONCE).astype(np.float64)
        of_documents = stream.multinomial(documents, np.full(documents, 1 / documents), DRAWN_AT_ONCE)
        for name, measured in arms.items():
            sums, counts = (
                ((of_seeds @ values) * of_documents).sum(axis=1) for values in (measured.sums, measured.counts)
            )
            draws[name].append(sums / counts)
    drawn = {name: np.concatenate(parts) for name, parts in draws.items()}
    means = {name: float(measured.sums.sum() / measured.counts.sum()) for name, measured in arms.items()}
    return {
        name: (
            _estimate(means[name], drawn[name]),
            None if name == baseline else _estimate(means[name] - means[baseline], drawn[name] - drawn[baseline]),
        )
        for name in arms
    }


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    low, high = np.percentile(draws, INTERVAL)
    return Estimate(value, float(low), float(high))


def draw_differences(panels: Mapping[str, Mapping[str, Mapping[str, Estimate]]], baseline: str) -> bytes:
    """PNG of differences with intervals: panels[title][quantity][arm]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(panels), 0.6 + 0.62 * max(map(len, panels.values()))), layout="constrained")
    for axis, (title, quantities) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        arms = list(dict.fromkeys(arm for of_arms in quantities.values() for arm in of_arms))
        for number, arm in enumerate(arms):
            places = [
                i + 0.22 * (number - (len(arms) - 1) / 2) for i, of in enumerate(quantities.values()) if arm in of
            ]
            found = [of[arm] for of in quantities.values() if arm in of]
            errors = [[e.value - e.low for e in found], [e.high - e.value for e in found]]
            axis.errorbar([e.value for e in found], places, xerr=errors, fmt="o", capsize=3, label=arm)
        axis.axvline(0, color="#656d76", linewidth=1)
        axis.set_yticks(range(len(quantities)), list(quantities))
        axis.invert_yaxis()
        axis.grid(axis="x", color="#eaedf0")
        axis.set_axisbelow(True)
        axis.locator_params(axis="x", nbins=5)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(f"difference from {baseline}, 95 % interval")
        axis.legend(frameon=False, fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()

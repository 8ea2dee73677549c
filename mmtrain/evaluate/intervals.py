"""Confidence intervals of proportions."""

import math
from dataclasses import dataclass

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Proportion:
    """`right` of `total`, and the 95 % interval of the true share."""

    right: int
    total: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """The observed share; NaN of nothing."""
        return self.right / self.total if self.total else math.nan


def wilson(right: int, total: int) -> Proportion:
    """Wilson's score interval at 95 %, good also near 0 and 1 and for few trials."""
    if total == 0:
        return Proportion(0, 0, 0.0, 1.0)
    share, z2 = right / total, Z_95**2
    center = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return Proportion(right, total, max(0.0, center - half), min(1.0, center + half))

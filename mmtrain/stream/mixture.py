"""Which source the next document comes from: the one that is farthest behind its share of the tokens.

Every token drawn credits all sources with their shares of it and debits the one it came from. In whole numbers, so
that every machine and every resumed run chooses alike.
"""

from collections.abc import Mapping

import numpy as np

ONE = 1 << 20  # a token, in units of credit


def share_at(schedule: Mapping[int, float], step: int) -> float:
    """The share that a schedule {step: share} gives a source: linear between its steps, constant outside them."""
    steps = sorted(schedule)
    return float(np.interp(step, steps, [schedule[s] for s in steps]))


def quotas(shares: Mapping[str, float]) -> dict[str, int]:
    """Credit of each source per token drawn, in proportion to `shares`; they add up to `ONE`."""
    total = sum(shares.values())
    result = {name: round(share / total * ONE) for name, share in shares.items()}
    largest = max(result, key=lambda name: result[name])
    result[largest] += ONE - sum(result.values())
    return result


def neediest(quota: Mapping[str, int], credit: Mapping[str, int]) -> str:
    """The source with the most credit among those that have a share (the first one on a tie)."""
    return max((name for name in quota if quota[name] > 0), key=lambda name: credit[name])


def draw(quota: Mapping[str, int], credit: dict[str, int], name: str, num_tokens: int) -> None:
    """Book `num_tokens` tokens of source `name` in `credit`, in place."""
    for other, share in quota.items():
        credit[other] += share * num_tokens
    credit[name] -= ONE * num_tokens

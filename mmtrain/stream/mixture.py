"""Which source the next document comes from."""

from collections.abc import Mapping


def neediest(weights: Mapping[str, float], drawn: Mapping[str, int]) -> str:
    """The source that is farthest behind its share of the tokens drawn so far (the first one on a tie).

    weights: share of each source, of any sum. drawn: tokens drawn from each.
    """
    share = sum(drawn.values()) / sum(weights.values())
    return max(weights, key=lambda name: weights[name] * share - drawn[name])

"""Wilson's interval against published numbers and its own properties."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtrain.evaluate.intervals import wilson


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17, 857-872), table I, method 3: Wilson without continuity correction.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_published_intervals(right: int, total: int, low: float, high: float) -> None:
    found = wilson(right, total)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(1, 5000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_the_interval_holds_the_share_and_mirrors(counts: tuple[int, int]) -> None:
    right, total = counts
    p, mirrored = wilson(right, total), wilson(total - right, total)
    assert 0 <= p.low <= p.share + 1e-12 and p.share - 1e-12 <= p.high <= 1
    assert p.low == pytest.approx(1 - mirrored.high, abs=1e-12)
    wider = wilson(right * 4, total * 4)
    assert wider.high - wider.low < p.high - p.low


def test_of_nothing_nothing_is_known() -> None:
    p = wilson(0, 0)
    assert (p.low, p.high) == (0.0, 1.0) and math.isnan(p.share)

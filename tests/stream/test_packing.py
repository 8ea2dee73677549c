from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from mmtrain.stream.packing import fullest_subset


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(40, 80))
def test_subset_holds_the_first_and_is_as_full_as_any(lengths, capacity):
    chosen = fullest_subset(lengths, capacity)
    rest = lengths[1:]
    best = max(
        lengths[0] + sum(some)
        for size in range(len(rest) + 1)
        for some in combinations(rest, size)
        if lengths[0] + sum(some) <= capacity
    )
    assert chosen[0] == 0 and len(set(chosen)) == len(chosen)
    assert sum(lengths[i] for i in chosen) == best


def test_older_documents_go_first_where_it_makes_no_difference():
    assert fullest_subset([5, 5, 5, 5], 10) == [0, 1]

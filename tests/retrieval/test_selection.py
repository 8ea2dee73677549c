import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtrain.config import RetrievalConfig
from mmtrain.retrieval import select, split_parts

POLICIES = st.sampled_from(["fixed", "uniform"])
ORDERS = st.sampled_from(["random", "best_last", "best_first"])


@given(st.integers(0, 8), st.integers(0, 5), POLICIES, ORDERS, st.integers(0, 1000))
def test_selection_takes_only_candidates_each_once_and_is_pure(num_candidates, num_documents, policy, order, key):
    config = RetrievalConfig(num_documents=num_documents, policy=policy, order=order)
    chosen = select(num_candidates, (0, key), config)
    assert set(chosen) <= set(range(num_candidates)) and len(set(chosen)) == len(chosen) <= num_documents
    assert chosen == select(num_candidates, (0, key), config)
    if policy == "fixed":
        assert len(chosen) == min(num_documents, num_candidates)
    if order != "random":
        assert chosen == sorted(chosen, reverse=order == "best_last")
        as_drawn = select(num_candidates, (0, key), RetrievalConfig(num_documents=num_documents, policy=policy))
        assert set(chosen) == set(as_drawn)


def test_policies_and_dropout_are_as_promised():
    def draw(**knobs):
        return [select(4, (0, i), RetrievalConfig(num_documents=2, **knobs)) for i in range(2000)]

    uniform = np.bincount([len(chosen) for chosen in draw()]) / 2000
    assert uniform == pytest.approx([1 / 3] * 3, abs=0.04)
    fixed = draw(policy="fixed")
    assert {len(chosen) for chosen in fixed} == {2}
    assert np.unique([chosen[0] for chosen in fixed], return_counts=True)[1] == pytest.approx([500] * 4, abs=80)
    assert np.mean([not chosen for chosen in draw(policy="fixed", dropout=0.25)]) == pytest.approx(0.25, abs=0.04)


def test_dropout_leaves_other_choices_as_they_are():
    for i in range(50):
        kept = select(4, (3, i), RetrievalConfig(policy="fixed"))
        assert select(4, (3, i), RetrievalConfig(policy="fixed", dropout=0.5)) in ([], kept)


def test_selection_is_the_same_in_every_process_and_version():
    assert [select(8, (1, "a", i), RetrievalConfig()) for i in range(6)] == [[], [], [6], [6], [7], [1, 4]]


@given(st.lists(st.lists(st.integers(3, 9), max_size=5), max_size=5))
def test_inlined_parts_are_split_where_they_were_joined(parts):
    eos = 2
    joined = np.array([token for part in parts for token in (*part, eos)], np.uint16)
    assert [part.tolist() for part in split_parts(joined, eos)] == parts

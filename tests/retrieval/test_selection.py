import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtrain.config import RetrievalConfig
from mmtrain.retrieval import select

CANDIDATES = np.array([11, 22, 33, 44, -1, -1])


@given(
    st.lists(st.integers(-1, 50), max_size=8, unique=True),
    st.integers(0, 5),
    st.sampled_from(["fixed", "uniform"]),
    st.integers(0, 1000),
)
def test_selection_takes_only_candidates_each_once_and_is_pure(candidates, num_documents, policy, key):
    config = RetrievalConfig(num_documents=num_documents, policy=policy)
    chosen = select(np.array(candidates, dtype=np.int64), (0, key), config)
    assert set(chosen) <= set(candidates) - {-1} and len(set(chosen)) == len(chosen) <= num_documents
    assert chosen == select(np.array(candidates, dtype=np.int64), (0, key), config)
    if policy == "fixed":
        assert len(chosen) == min(num_documents, len(set(candidates) - {-1}))


def test_policies_dropout_and_order_are_as_promised():
    def draw(**knobs):
        return [select(CANDIDATES, (0, i), RetrievalConfig(num_documents=2, **knobs)) for i in range(2000)]

    uniform = np.bincount([len(chosen) for chosen in draw()]) / 2000
    assert uniform == pytest.approx([1 / 3] * 3, abs=0.04)
    fixed = draw(policy="fixed")
    assert {len(chosen) for chosen in fixed} == {2}
    assert np.unique([chosen[0] for chosen in fixed], return_counts=True)[1] == pytest.approx([500] * 4, abs=80)
    assert np.mean([not chosen for chosen in draw(policy="fixed", dropout=0.25)]) == pytest.approx(0.25, abs=0.04)


def test_dropout_leaves_other_choices_as_they_are():
    for i in range(50):
        kept = select(CANDIDATES, (3, i), RetrievalConfig(policy="fixed"))
        assert select(CANDIDATES, (3, i), RetrievalConfig(policy="fixed", dropout=0.5)) in ([], kept)


def test_selection_is_the_same_in_every_process_and_version():
    assert [select(np.arange(8), (1, "a", i), RetrievalConfig()) for i in range(6)] == [[], [], [6], [6], [7], [1, 4]]

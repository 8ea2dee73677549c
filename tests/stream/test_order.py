import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmtrain.stream import permute


@given(st.integers(1, 500), st.integers(0, 2**62), st.integers(0, 2**40))
def test_it_is_a_permutation(n, seed, epoch):
    assert sorted(permute(np.arange(n), n, seed, epoch).tolist()) == list(range(n))


@given(st.integers(40, 500), st.integers(0, 1000))
def test_epochs_and_seeds_differ(n, seed):
    orders = {tuple(permute(np.arange(n), n, s, e).tolist()) for s in (seed, seed + 1) for e in (0, 1, 2)}
    assert len(orders) == 6


def test_arrays_of_epochs_and_single_values_agree():
    index, epoch = np.array([3, 4, 5]), np.array([0, 7, 7])
    together = permute(index, 100, 5, epoch)
    assert together.tolist() == [int(permute(i, 100, 5, e)) for i, e in zip(index, epoch, strict=True)]


def test_order_has_no_trend_and_is_uniform_over_places():
    n, epochs = 20, 4000
    places = permute(np.tile(np.arange(n), epochs), n, 1, np.repeat(np.arange(epochs), n)).reshape(epochs, n)
    counts = np.stack([np.bincount(places[:, i], minlength=n) for i in range(n)])
    assert np.abs(counts - epochs / n).max() < 6 * np.sqrt(epochs / n)
    large = permute(np.arange(100_000), 100_000, 1)
    assert abs(np.corrcoef(large, np.arange(100_000))[0, 1]) < 0.02
    assert abs(np.corrcoef(large[1:], large[:-1])[0, 1]) < 0.02


def test_billions_of_documents_need_no_memory():
    n = 5_000_000_000
    places = permute(np.arange(1000) * 4_999_999, n, 3)
    assert len(set(places.tolist())) == 1000 and places.min() >= 0 and places.max() < n

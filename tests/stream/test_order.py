import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmtrain.stream import Order, permute


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


SHARDS = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)  # some are empty


@given(SHARDS, st.integers(0, 13), st.integers(0, 1000))
def test_every_epoch_gives_each_document_once_however_many_shards_are_shuffled_together(sizes, together, seed):
    order, n = Order(sizes, seed, together), sum(sizes)
    epoch, index = order.places(np.arange(3 * n))
    assert epoch.tolist() == np.repeat(np.arange(3), n).tolist()
    epochs = index.reshape(3, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    assert n < 8 or len({tuple(row) for row in epochs.tolist()}) > 1
    some = np.array([2 * n, 0, n // 2])  # asked for alone, and in any order
    assert order.places(some)[1].tolist() == index[some].tolist()


def test_only_so_many_shards_are_read_at_a_time():
    sizes = [10, 20, 30, 40, 50, 60, 70]
    order = Order(sizes, 5, 3)
    _, index = order.places(np.arange(280))
    shard = np.searchsorted(np.cumsum(sizes), index, side="right")
    groups = [order.shards(0, place).tolist() for place in range(280)]
    assert all(number in group for number, group in zip(shard.tolist(), groups, strict=True))
    assert [len(group) for group in dict.fromkeys(map(tuple, groups))] == [3, 3, 1]
    first = shard[: sum(sizes[number] for number in groups[0])]
    assert (np.diff(first) != 0).sum() > 20  # shuffled among one another, not one after the other


def test_position_against_index_shows_no_structure():
    """Chi-square of a 32 x 32 table of place against document, in four epochs."""
    n, bins = 200_000, 32
    for epoch in range(4):
        places = permute(np.arange(n), n, 7, epoch)
        table, _, _ = np.histogram2d(np.arange(n) * bins // n, places * bins // n, bins=bins)
        expected = n / bins**2
        chi_square = ((table - expected) ** 2 / expected).sum()
        freedom = (bins - 1) ** 2
        assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)

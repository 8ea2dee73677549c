"""KID and Frechet distance: known values, another formula, unbiasedness."""

import numpy as np
import pytest

from mmtrain.evaluate.distances import EXTRACTOR, NUM_BLOCKS, frechet_distance, kid_blocks, measure_distances


def gaussian(n: int, mean: np.ndarray, covariance: np.ndarray, seed: int) -> np.ndarray:
    """n rows whose sample mean and covariance are exactly those given."""
    x = np.random.default_rng(seed).standard_normal((n, len(mean)))
    x -= x.mean(axis=0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_with_commuting_covariances():
    mean, variances = np.array([1.0, -2.0, 0.5]), (np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0]))
    x, y = gaussian(50, mean, np.diag(variances[0]), 1), gaussian(40, 0 * mean, np.diag(variances[1]), 2)
    exact = (mean**2).sum() + ((np.sqrt(variances[0]) - np.sqrt(variances[1])) ** 2).sum()
    assert frechet_distance(x, y) == pytest.approx(exact, rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_agrees_with_eigenvalues_of_the_product():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((60, 8)) @ rng.standard_normal((8, 8)), rng.standard_normal((70, 8)) + 0.3
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    overlap = np.sqrt(np.linalg.eigvals(cov_x @ cov_y).real).sum()  # of a matrix that is not symmetric
    shift = ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum()
    assert frechet_distance(x, y) == pytest.approx(shift + np.trace(cov_x) + np.trace(cov_y) - 2 * overlap, rel=1e-9)


def test_kid_of_one_block_is_the_sum_over_pairs():
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((6, 5)), rng.standard_normal((6, 5)) + 1

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 5 + 1) ** 3)

    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    naive = np.mean([k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in pairs])
    assert kid_blocks(x, y, 1) == pytest.approx([naive], rel=1e-12)


def test_kid_of_equal_distributions_is_zero_within_its_error_also_for_pairs_that_depend_on_one_another():
    rng = np.random.default_rng(5)
    z = []
    for _ in range(300):
        shared = rng.standard_normal((40, 4))
        x, y = (shared + rng.standard_normal((40, 4)) for _ in range(2))
        blocks = kid_blocks(x, y)
        z.append(blocks.mean() / (blocks.std(ddof=1) / np.sqrt(NUM_BLOCKS)))
    assert abs(np.mean(z)) < 0.25  # a biased estimator would be off in the same direction every time
    assert 0.8 < np.std(z) < 1.6  # Student's t with 9 degrees of freedom: 1.13


def test_pictures_like_the_true_ones_are_nearer():
    rng = np.random.default_rng(6)
    true = np.repeat(np.repeat(rng.integers(0, 256, (80, 6, 6, 3), dtype=np.uint8), 8, axis=1), 8, axis=2)
    noisy = np.clip(true + rng.normal(0, 10, true.shape), 0, 255).astype(np.uint8)
    near, far = measure_distances(noisy, true), measure_distances(np.full_like(true, 128), true)
    same = measure_distances(true, true)
    assert near and far and same and near.frechet is not None and far.frechet is not None
    assert near.extractor == EXTRACTOR and near.num_pictures == 80 and len(near.blocks) == NUM_BLOCKS
    assert same.kid == pytest.approx(0, abs=1e-12) and same.frechet == pytest.approx(0, abs=1e-6)
    assert near.kid + 3 * near.kid_error < far.kid and near.frechet < far.frechet


def test_too_few_pictures_give_no_distance():
    pictures = np.zeros((2 * NUM_BLOCKS - 1, 16, 16, 3), np.uint8)
    assert measure_distances(pictures, pictures) is None

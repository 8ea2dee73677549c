"""How far the distribution of drawn pictures is from that of true ones: KID and Frechet distance.

Both compare feature vectors, so a value means nothing without the name of what extracted them. Here it is the
`hashed` encoder of retrieval (colors and edges of 8 x 8 cells, a color histogram; nothing learned): a stand-in, whose
values compare with one another and with no published FID.

Legend: N pictures, F features.
"""

from dataclasses import dataclass

import numpy as np
import PIL.Image

from mmtrain.config.randomness import random_stream
from mmtrain.retrieval.hashed import PICTURE_FEATURES, PICTURE_SIZE, picture_features

EXTRACTOR = "hashed features"
KERNEL_DEGREE = 3  # of the polynomial kernel (x y / F + 1)^3, Binkowski et al. 2018, sec. 4
NUM_BLOCKS = 10
# A covariance of N pictures has rank N - 1 at most, so the Frechet distance is taken in few dimensions.
FRECHET_DIMENSION = 32


@dataclass(frozen=True)
class Distances:
    """Of pictures to true ones. kid, kid_error: mean of `blocks` and its standard error; frechet: biased upwards by
    few pictures, None below 2 * FRECHET_DIMENSION of them."""

    extractor: str
    num_pictures: int
    kid: float
    kid_error: float
    blocks: tuple[float, ...]
    frechet: float | None


def measure_distances(drawn: np.ndarray, true: np.ndarray) -> Distances | None:
    """Distances of `drawn` to `true`, (N, S, S, 3) uint8 each, pair by pair of the same document.

    None for fewer than two pictures per block, of which no error could be told.
    """
    if len(drawn) < 2 * NUM_BLOCKS:
        return None
    drawn_NF, true_NF = extract(drawn), extract(true)
    blocks = kid_blocks(drawn_NF, true_NF)
    frechet = None
    if len(drawn) >= 2 * FRECHET_DIMENSION:
        projection = _projection()
        frechet = frechet_distance(drawn_NF @ projection, true_NF @ projection)
    error = float(blocks.std(ddof=1) / np.sqrt(len(blocks)))
    return Distances(EXTRACTOR, len(drawn), float(blocks.mean()), error, tuple(blocks.tolist()), frechet)


def extract(pictures: np.ndarray) -> np.ndarray:
    """(N, S, S, 3) uint8 to features (N, F) float64 whose mean square is 1, resized with antialiasing (bicubic)."""
    side = (PICTURE_SIZE, PICTURE_SIZE)
    resized = [PIL.Image.fromarray(picture).resize(side, PIL.Image.Resampling.BICUBIC) for picture in pictures]
    features_NF = np.stack([picture_features(np.asarray(picture)) for picture in resized]).astype(np.float64)
    return features_NF * np.sqrt(PICTURE_FEATURES / 3)  # three parts of unit norm


def kid_blocks(x_NF: np.ndarray, y_NF: np.ndarray, num_blocks: int = NUM_BLOCKS) -> np.ndarray:
    """Unbiased squared MMD with the polynomial kernel on each of `num_blocks` disjoint blocks (Zaremba et al. 2013).

    Row i of x and row i of y may depend on one another (the same caption): the U-statistic of Gretton et al. 2012
    (eq. 3) never compares them. Their mean is KID, and their spread over the square root of their number its standard
    error, also where both distributions are equal. Returns (num_blocks,) float64.
    """
    values = []
    for x, y in zip(np.array_split(x_NF, num_blocks), np.array_split(y_NF, num_blocks), strict=True):
        cross = _kernel(x, y)
        h = _kernel(x, x) + _kernel(y, y) - cross - cross.T
        values.append((h.sum() - np.trace(h)) / (len(x) * (len(x) - 1)))
    return np.array(values)


def frechet_distance(x_NF: np.ndarray, y_NF: np.ndarray) -> float:
    """Frechet distance between Gaussians with the means and covariances of the rows (Dowson and Landau 1982)."""
    cov_x, cov_y = (np.atleast_2d(np.cov(v, rowvar=False)) for v in (x_NF, y_NF))
    root = _square_root(cov_x)
    overlap = np.trace(_square_root(root @ cov_y @ root))
    shift = ((x_NF.mean(axis=0) - y_NF.mean(axis=0)) ** 2).sum()
    return float(shift + np.trace(cov_x) + np.trace(cov_y) - 2 * overlap)


def _kernel(x_NF: np.ndarray, y_NF: np.ndarray) -> np.ndarray:
    return (x_NF @ y_NF.T / x_NF.shape[1] + 1.0) ** KERNEL_DEGREE


def _square_root(covariance: np.ndarray) -> np.ndarray:
    """Of a positive semi-definite matrix; eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def _projection() -> np.ndarray:
    """(F, FRECHET_DIMENSION), normal: keeps squared distances in expectation; a constant."""
    stream = random_stream("distances", "projection")
    return stream.standard_normal((PICTURE_FEATURES, FRECHET_DIMENSION)) / np.sqrt(FRECHET_DIMENSION)

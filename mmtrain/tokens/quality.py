"""How close a reconstruction is to its original: PSNR and SSIM."""

import numpy as np
import torch
import torch.nn.functional as F

# Wang, Bovik, Sheikh, Simoncelli: Image quality assessment (IEEE TIP 2004), sec. III-C: 11x11 window, sigma 1.5,
# K1 = 0.01, K2 = 0.03, dynamic range 255.
WINDOW = 11
SIGMA = 1.5
C1 = (0.01 * 255) ** 2
C2 = (0.03 * 255) ** 2
# A perfect reconstruction would count as infinitely good; 100 dB is the customary ceiling.
PSNR_CEILING = 100.0


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture in dB, at most 100. a, b: (N, S, S, 3) uint8. Returns (N,) float64."""
    error = (a.astype(np.float64) - b.astype(np.float64)) ** 2
    mean = np.maximum(error.mean(axis=(1, 2, 3)), 255.0**2 * 10 ** (-PSNR_CEILING / 10))
    return 10 * np.log10(255.0**2 / mean)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity (Wang et al. 2004) of each picture, mean over channels and places where the window fits.

    a, b: (N, S, S, 3) uint8; a side below 11 pixels shrinks the window. Returns (N,) float64, 1 for equal pictures.
    """
    x, y = (torch.from_numpy(np.ascontiguousarray(each)).permute(0, 3, 1, 2).double() for each in (a, b))
    side = min(WINDOW, *x.shape[2:])
    offsets = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    profile = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    profile = profile / profile.sum()

    def smooth(image: torch.Tensor) -> torch.Tensor:
        vertical = profile.view(1, 1, -1, 1).expand(image.shape[1], -1, -1, -1)
        return F.conv2d(F.conv2d(image, vertical, groups=3), vertical.transpose(2, 3), groups=3)

    mean_x, mean_y = smooth(x), smooth(y)
    variance_x = smooth(x * x) - mean_x**2
    variance_y = smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return (luminance * structure).mean(dim=(1, 2, 3)).numpy()

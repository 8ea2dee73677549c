import numpy as np
import pytest

from mmtrain.tokens.quality import psnr, ssim

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)


def test_psnr_of_a_known_error():
    a = np.zeros((1, 8, 8, 3), np.uint8)
    assert psnr(a, a + 255)[0] == pytest.approx(0)
    assert psnr(a, a + 1)[0] == pytest.approx(20 * np.log10(255))
    assert psnr(a, a)[0] == pytest.approx(100)


def test_ssim_is_one_for_equal_pictures_and_symmetric():
    noisy = np.clip(PICTURES.astype(int) + RNG.integers(-60, 60, PICTURES.shape), 0, 255).astype(np.uint8)
    assert ssim(PICTURES, PICTURES).shape == psnr(PICTURES, PICTURES).shape == (2,)
    assert ssim(PICTURES, PICTURES) == pytest.approx([1, 1])
    assert ssim(PICTURES, noisy) == pytest.approx(ssim(noisy, PICTURES))
    assert (ssim(PICTURES, noisy) < 0.99).all()


def test_ssim_of_flat_pictures_is_the_luminance_term():
    a, b = np.full((1, 16, 16, 3), 50, np.uint8), np.full((1, 16, 16, 3), 100, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b)[0] == pytest.approx((2 * 50 * 100 + c1) / (50**2 + 100**2 + c1))


def test_ssim_of_unrelated_noise_is_near_zero_and_of_a_negative_below():
    other = RNG.integers(0, 256, PICTURES.shape, dtype=np.uint8)
    assert abs(ssim(PICTURES, other)).max() < 0.1
    assert ssim(PICTURES, 255 - PICTURES).max() < -0.5

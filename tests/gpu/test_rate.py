"""On a CUDA device: the measured rate of matrix products beside the published peak."""

import pytest
import torch

from mmtrain.flops import measured_matmul_rate, peak_flops

pytestmark = pytest.mark.gpu


def test_measured_rate_is_below_the_published_peak_and_not_far():
    peak = peak_flops(torch.cuda.get_device_name())
    rate = measured_matmul_rate(device="cuda", seconds=0.5)
    assert rate > 1e12
    if peak is None:
        pytest.skip(f"no source for the peak of {torch.cuda.get_device_name()}")
    assert 0.3 * peak < rate < peak

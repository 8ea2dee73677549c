"""Peaks by torch's device names, and the measured rate."""

import pytest
import torch

from mmtrain.flops.devices import measured_matmul_rate, peak_flops
from mmtrain.flops.registry import load_accelerators


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("AMD Instinct MI300X", 1307e12),
        ("AMD Instinct MI250X", 191.5e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peak_by_torch_name(name, peak):
    assert peak_flops(name) == peak


def test_other_precisions_have_no_peak():
    assert peak_flops("NVIDIA H200", torch.float32) is None


@pytest.mark.parametrize("key", load_accelerators())
def test_peaks_agree_with_the_registry(key):
    # torch sees a MI250X package as two devices
    name = key.replace("TPU", "TPU ")
    assert peak_flops(name) == load_accelerators()[key].number / (2 if key == "MI250X" else 1)


def test_measured_rate_is_plausible_and_leaves_threads_alone():
    before = torch.get_num_threads()
    assert 1e8 < measured_matmul_rate(torch.float32, threads=1, seconds=0.2) < 1e14
    assert torch.get_num_threads() == before

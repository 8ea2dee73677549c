"""Peak matrix-product rates of accelerators, and a measured rate where there is no published one.

Peaks are dense bf16 tensor-core FLOP/s per torch device (vendors often print the 2:4-sparse figure, twice as
much). An unknown device, a slice of one (MIG) or another precision has no peak here: no MFU, never a guess.
"""

import re
import time
from dataclasses import dataclass

import torch

SCALING_BOOK = "jax-ml/scaling-book tpus.md@0819a7d"
TORCHTITAN = "pytorch/torchtitan torchtitan/tools/utils.py get_peak_flops@b5bcd76"
LIGHTNING = "Lightning-AI/pytorch-lightning src/lightning/fabric/utilities/throughput.py@7f0c343"
ML_ENGINEERING = "stas00/ml-engineering compute/accelerator/README.md@744d01e"


@dataclass(frozen=True)
class Device:
    """An accelerator: `pattern` is searched in the name that torch gives; `peak` is in FLOP/s."""

    name: str
    pattern: str
    peak: float
    source: str
    note: str = ""


# The first match wins, so narrower names come first. H200 NVL, GH200, H800 and others are left out on
# purpose: no source for their dense bf16 rate was read.
DEVICES = (
    Device("GB200", r"\bGB200\b", 2.5e15, f"{TORCHTITAN}; {ML_ENGINEERING}"),
    Device("B200", r"\bB200\b", 2.25e15, f"{TORCHTITAN}; {ML_ENGINEERING}"),
    Device("H200 SXM", r"\bH200\b(?!.*NVL)", 9.89e14, f"{TORCHTITAN}; {LIGHTNING}; {ML_ENGINEERING}"),
    Device("H100 NVL", r"\bH100\b.*NVL", 8.35e14, f"{TORCHTITAN}; {ML_ENGINEERING}"),
    Device("H100 PCIe", r"\bH100\b.*PCIe", 7.56e14, f"{TORCHTITAN}; {LIGHTNING}; {ML_ENGINEERING}"),
    Device("H100 SXM", r"\bH100\b", 9.89e14, f"{TORCHTITAN}; {LIGHTNING}; {ML_ENGINEERING}"),
    Device("A100", r"\bA100\b", 3.12e14, f"{TORCHTITAN}; {LIGHTNING}; {ML_ENGINEERING}"),
    Device("V100 PCIe", r"\bV100\b.*PCIE", 1.12e14, LIGHTNING, "fp16 tensor cores; the V100 has no bf16"),
    Device("V100 SXM", r"\bV100\b.*SXM", 1.25e14, LIGHTNING, "fp16 tensor cores; the V100 has no bf16"),
    Device("MI300X", r"\bMI300X\b", 1.307e15, f"{ML_ENGINEERING} (by clock; torchtitan: 1.3e15)"),
    Device("MI250X (one GCD)", r"\bMI250X\b", 1.915e14, TORCHTITAN, "torch sees two devices per package"),
    Device(
        "TPU v6e",
        r"\bTPU ?v6(e| ?lite)\b",
        9.18e14,
        f"{TORCHTITAN}; {ML_ENGINEERING}",
        "per chip; scaling-book: 9.20e14",
    ),
    Device("TPU v5p", r"\bTPU ?v5p\b", 4.59e14, f"{TORCHTITAN}; {SCALING_BOOK}", "per chip"),
    Device("TPU v5e", r"\bTPU ?v5(e| ?lite)\b", 1.97e14, f"{TORCHTITAN}; {LIGHTNING}; {SCALING_BOOK}", "per chip"),
    Device("TPU v4", r"\bTPU ?v4\b", 2.75e14, f"{LIGHTNING}; {TORCHTITAN}; {ML_ENGINEERING}", "per chip"),
    Device("TPU v3", r"\bTPU ?v3\b", 1.23e14, LIGHTNING, "per chip of two cores"),
    Device("TPU v2", r"\bTPU ?v2\b", 4.5e13, LIGHTNING, "per chip of two cores"),
)


# GiB that a torch device has, from the table of memory sizes in the ML_ENGINEERING page above at b9e2972 (MI250X: half
# of the package; the driver takes about 1 %). Left out: V100 and H100 NVL, which have several sizes or none there, and
# B200 and GB200, of which devices report less than the table says.
MEMORY_GIB = {"A100": 80, "H100 SXM": 80, "H100 PCIe": 80, "H200 SXM": 141, "MI300X": 192, "MI250X (one GCD)": 64}


def memory_gib(name: str) -> float | None:
    """GiB of the largest accelerator that is sold as `name` (an A100 has 80 or 40); None when unknown."""
    device = find_device(name)
    return MEMORY_GIB.get(device.name) if device else None


def find_device(name: str) -> Device | None:
    """The accelerator that torch calls `name` ("NVIDIA H100 80GB HBM3"), or None when it is not in the table."""
    if re.search(r"\bMIG\b", name):
        return None
    return next((device for device in DEVICES if re.search(device.pattern, name, re.IGNORECASE)), None)


def peak_flops(name: str, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """Published peak of the accelerator `name` in FLOP/s for `dtype`; None when unknown."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    device = find_device(name)
    return device.peak if device else None


def measured_matmul_rate(
    dtype: torch.dtype = torch.bfloat16,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    seconds: float = 1.0,
) -> float:
    """FLOP/s of square matrix products on this machine, the best of up to 8 rounds that take about `seconds`.

    A yardstick where no peak is published (CPUs): an MFU against it must say so. threads: CPU threads to use
    (None: torch's current number, which is restored afterwards in any case).
    """
    device = torch.device(device)
    on_gpu = device.type != "cpu"
    size = 8192 if on_gpu else 1024
    before = torch.get_num_threads()
    if threads is not None and not on_gpu:
        torch.set_num_threads(threads)
    try:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty(size, size, device=device, dtype=dtype)

        def timed(repeats: int) -> float:
            if on_gpu:
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats):
                torch.mm(left, right, out=out)
            if on_gpu:
                torch.cuda.synchronize(device)
            return time.perf_counter() - start

        with torch.no_grad():
            each = min(timed(1), timed(1))  # the first pays for kernel selection
            repeats = max(1, int(seconds / 8 / each))
            rounds = max(1, min(8, int(seconds / each)))  # fewer where a processor emulates the type
            best = min(timed(repeats) for _ in range(rounds))
        return 2 * size**3 * repeats / best
    finally:
        torch.set_num_threads(before)

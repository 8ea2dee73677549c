"""Compute: configurations and token counts in; FLOPs, ledgers and comparisons with published models out.

One multiply-add is 2 FLOPs everywhere. Counts are Python integers and exact; rates are floats. Must never
guess: an unknown device has no peak, a value known only from memory stays out of figures and tables.
"""

from mmtrain.flops.compare import ComputeRow, OwnRun, comparison_figure, compute_table
from mmtrain.flops.count import (
    BACKWARD_AND_FORWARD,
    TOKEN_KINDS,
    ModuleFlops,
    StepFlops,
    document_lengths,
    flops_by_module,
    flops_from_sums,
    forward_flops,
    forward_flops_per_token,
    matmul_parameters,
    split_by_kind,
    step_flops,
)
from mmtrain.flops.devices import Device, find_device, measured_matmul_rate, memory_gib, peak_flops
from mmtrain.flops.hours import hours_figure, hours_table
from mmtrain.flops.journal import Account, Journal, read_account
from mmtrain.flops.ledger import BOOKS, Ledger
from mmtrain.flops.lineage import base_model
from mmtrain.flops.registry import Baseline, Quantity, load_registry

__all__ = [
    "BACKWARD_AND_FORWARD",
    "BOOKS",
    "TOKEN_KINDS",
    "Account",
    "Baseline",
    "ComputeRow",
    "Device",
    "Journal",
    "Ledger",
    "ModuleFlops",
    "OwnRun",
    "Quantity",
    "StepFlops",
    "base_model",
    "comparison_figure",
    "compute_table",
    "document_lengths",
    "find_device",
    "flops_by_module",
    "flops_from_sums",
    "forward_flops",
    "forward_flops_per_token",
    "hours_figure",
    "hours_table",
    "load_registry",
    "matmul_parameters",
    "measured_matmul_rate",
    "memory_gib",
    "peak_flops",
    "read_account",
    "split_by_kind",
    "step_flops",
]

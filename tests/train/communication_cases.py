"""Bytes that a rank hands to torch's collectives in one training step, by collective, and what the plan says.

torchrun --nproc_per_node 2 communication_cases.py OUT [CASE ...]
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

BYTES: Counter[str] = Counter()
ON_THE_WAY = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
"""Times that a ring sends (N - 1) / N of the whole."""


def count_collectives() -> None:
    """Count the bytes of every collective from now on; before DeepSpeed is imported, which keeps the functions."""

    def counting(kind: str, original: Callable, whole: Callable[[tuple], Any]) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            tensors = whole((*args, *options.values()))
            tensors = tensors if isinstance(tensors, list) else [tensors]
            BYTES[kind] += sum(tensor.nbytes for tensor in tensors)
            return original(*args, **options)

        return call

    for kind, names, position in (
        ("all_reduce", ("all_reduce",), 0),
        ("all_gather", ("all_gather", "all_gather_into_tensor", "_all_gather_base"), 0),
        ("reduce_scatter", ("reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base"), 1),
        ("other", ("reduce", "broadcast"), 0),
    ):
        for name in names:
            if hasattr(dist, name):
                setattr(dist, name, counting(kind, getattr(dist, name), lambda a, p=position: a[p]))

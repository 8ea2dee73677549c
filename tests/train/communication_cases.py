"""What a rank really hands to torch's collectives, counted in the processes that memory_cases.py starts."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from mmtrain.train import zero

BYTES: Counter[str] = Counter()
"""Of all calls since it was cleared: of what is reduced, or of what all ranks have after a gather."""
PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
"""How often a ring passes (N - 1) / N of them on."""
FUNCTIONS = {
    "all_reduce": ("all_reduce",),
    "all_gather": ("all_gather", "all_gather_into_tensor"),
    "reduce_scatter": ("reduce_scatter", "reduce_scatter_tensor"),
    "other": ("reduce", "broadcast", "all_to_all", "all_to_all_single", "gather", "scatter"),
}


def count_collectives() -> None:
    """Count from now on; to be called before DeepSpeed is imported, which keeps the functions that it finds."""

    def counting(kind: str, original: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            tensors = [*args, *options.values()][1 if kind == "reduce_scatter" else 0]
            BYTES[kind] += sum(t.nbytes for t in (tensors if isinstance(tensors, list) else [tensors]))
            return original(*args, **options)

        return call

    for kind, names in FUNCTIONS.items():
        for name in names:
            setattr(dist, name, counting(kind, getattr(dist, name)))


def sent(ranks: int) -> int:
    """Bytes that a ring over `ranks` ranks passes on, of what was counted."""
    assert not BYTES["other"], BYTES
    return sum(BYTES[kind] * passes for kind, passes in PASSES.items()) * (ranks - 1) // ranks


@contextmanager
def reusing_within(elements: int) -> Iterator[None]:
    """Let stage 3 keep as little as a model many times the size would: at 10^9 elements it keeps all of a small one."""
    original = zero.deepspeed_config

    def changed(*args: Any) -> dict[str, Any]:
        settings = original(*args)
        if settings["zero_optimization"]["stage"] == 3:
            settings["zero_optimization"] |= {
                "stage3_max_live_parameters": elements,
                "stage3_max_reuse_distance": elements,
                "stage3_prefetch_bucket_size": elements // 20,
            }
        return settings

    zero.deepspeed_config = changed
    try:
        yield
    finally:
        zero.deepspeed_config = original

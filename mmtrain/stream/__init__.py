"""From token shards to batches: order, mixture, retrieval, objective, packing.

In: sources of token documents, the configuration, a seed. Out: `Batch`es of torch tensors on the CPU.
It must never let a batch depend on anything but seed and step: not on the number of processes, on what was
asked before, on prefetching, or on the clock.
"""

from mmtrain.stream.batch import COLUMNS, Batch, BatchCounts
from mmtrain.stream.order import Order, permute
from mmtrain.stream.prefetch import Batches, prefetch
from mmtrain.stream.source import Source
from mmtrain.stream.stream import Stream, merge_states

__all__ = [
    "COLUMNS",
    "Batch",
    "BatchCounts",
    "Batches",
    "Order",
    "Source",
    "Stream",
    "merge_states",
    "permute",
    "prefetch",
]

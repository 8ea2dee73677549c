"""From token shards to batches: order, mixture, retrieval, objective, packing.

In: sources of token documents, the configuration, a seed. Out: `Batch`es of torch tensors on the CPU.
It must never let a batch depend on anything but seed and step: not on the number of processes, on what was
asked before, on prefetching, or on the clock.
"""

from mmtrain.stream.batch import CACHE, COLUMNS, Batch, BatchCounts, collate
from mmtrain.stream.order import Order, permute
from mmtrain.stream.prefetch import Batches, prefetch
from mmtrain.stream.source import Recipe, Source
from mmtrain.stream.stream import Stream, merge_states

__all__ = [
    "CACHE",
    "COLUMNS",
    "Batch",
    "BatchCounts",
    "Batches",
    "Order",
    "Recipe",
    "Source",
    "Stream",
    "collate",
    "merge_states",
    "permute",
    "prefetch",
]

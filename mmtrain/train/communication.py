"""How many bytes a rank sends in one training step, from the collectives that DeepSpeed 0.19 really calls.

A ring over N ranks passes (N - 1) / N of a reduce-scatter's input or an all-gather's output on, and twice that of an
all-reduce (Thakur et al. 2005, sec. 4). What differs from the ZeRO paper (Rajbhandari et al. 2020, arXiv 1910.02054,
sec. 7), as counted by tests/train/communication_cases.py: stages 1 and 2 all-reduce their gradients, stage 2 in every
micro-batch; and stage 3 keeps what its backward pass needs soon, so that it gathers less than twice.
"""

from dataclasses import dataclass

from torch import nn

from mmtrain.config import Config
from mmtrain.models import Decoder, count_parameters, shapes_only
from mmtrain.train.activations import Precision

REUSED_WITHIN = 1_000_000_000  # elements: stage3_max_reuse_distance
PERSISTENT = 100_000  # elements of a parameter that stage 3 leaves whole: stage3_param_persistence_threshold


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step: for the sum of gradients, and for gathering parameters."""

    gradients: int
    parameters: int

    @property
    def total(self) -> int:
        """Bytes of both."""
        return self.gradients + self.parameters

    def seconds(self, gpus_per_node: int, nodes: int, intra_node_gbps: float, inter_node_gbps: float) -> float:
        """Time of rings that are limited by the slower of two links, latency left out.

        intra_node_gbps: Gbit/s that one GPU sends within its node; inter_node_gbps: Gbit/s that leave a node over all
        of its adapters. Every byte that a rank passes on crosses each node's border once.
        """
        inside = self.total / (intra_node_gbps * 1e9 / 8) if gpus_per_node > 1 else 0.0
        return max(inside, self.total / (inter_node_gbps * 1e9 / 8) if nodes > 1 else 0.0)


def traffic(
    config: Config,
    vocabulary_size: int,
    positions: int,
    ranks: int,
    stage: int | None,
    reused_within: int = REUSED_WITHIN,
) -> Traffic:
    """What one rank sends in a step; stage: of ZeRO, None for DDP. Arguments as of `memory.estimate`."""
    P = count_parameters(config.model, vocabulary_size, positions)
    size = Precision.of(config, stage is None).parameter
    summed = 2 if stage is not None and config.engine.reduce_dtype == "bf16" else 4
    share = config.stream.global_batch // ranks
    micro_batches = share // (config.engine.micro_batch or share)

    def sent(elements: int) -> int:
        return elements * (ranks - 1) // ranks

    if stage in (None, 0):
        return Traffic(sent(2 * 4 * P), 0)
    if stage in (1, 2):
        passes = micro_batches if stage == 2 else 1
        return Traffic(passes * sent(2 * summed * P), sent(size * P))
    gathered, once = _gathered(config, vocabulary_size, positions, reused_within)
    return Traffic(micro_batches * sent(summed * P), micro_batches * sent(size * gathered) + sent(size * once))


def _gathered(config: Config, vocabulary_size: int, positions: int, reused_within: int) -> tuple[int, int]:
    """Elements that stage 3 gathers in each micro-batch, and once in each step: small parameters, which it keeps.

    Parameters are gathered for the module that uses them, and let go behind it unless the modules of the next
    `reused_within` elements use them again (partitioned_param_coordinator.py).
    """
    model = shapes_only(config.model, vocabulary_size, positions)
    order = [[p for p in module.parameters(recurse=False) if p.numel() > PERSISTENT] for module in _order(model)]
    sizes = [sum(p.numel() for p in module.parameters(recurse=False)) for module in _order(model)]
    gathered, there = 0, set[nn.Parameter]()
    for position, used in enumerate(order, 1):
        gathered += sum(p.numel() for p in used if p not in there)
        there.update(used)
        soon, traversed = set[nn.Parameter](), 0
        while position < len(order) and traversed < reused_within:
            soon.update(order[position])
            traversed += sizes[position]
            position += 1
        there.difference_update(p for p in used if p not in soon)
    return gathered, sum(p.numel() for p in model.parameters() if p.numel() <= PERSISTENT)


def _order(model: Decoder) -> list[nn.Module]:
    """The modules in the order in which a micro-batch uses them, there and back."""
    blocks = [list(block.modules()) for block in model.blocks]
    inside = {module for block in blocks for module in block}
    around = [module for module in model.modules() if module not in inside]
    embeddings = [module for module in around if isinstance(module, nn.Embedding)]
    head = [module for module in around if module not in embeddings]
    forward = [*embeddings, *(module for block in blocks for module in block), *head]
    backward = head[::-1]
    for block in reversed(blocks):
        backward += [*(block if model.config.activation_checkpointing else []), *reversed(block)]
    return [*forward, *backward, *reversed(embeddings)]

"""How many bytes a rank sends in one training step, from the collectives that DeepSpeed 0.19 really calls.

A ring over N ranks passes (N - 1) / N of a reduce-scatter's input or an all-gather's output on, and twice that of an
all-reduce (Thakur et al. 2005, sec. 4). What differs from the ZeRO paper (Rajbhandari et al. 2020, arXiv 1910.02054,
sec. 7), as counted by tests/train/communication_cases.py: stages 1 and 2 all-reduce their gradients, stage 2 in every
micro-batch; and stage 3 keeps what its backward pass needs soon, so that it gathers less than twice.
"""

from dataclasses import dataclass

from mmtrain.config import Config
from mmtrain.models import count_parameters
from mmtrain.train.activations import Precision

REUSED_WITHIN = 1_000_000_000  # elements: stage3_max_reuse_distance


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
    gathered = _gathered(config, P, vocabulary_size, reused_within)
    return Traffic(micro_batches * sent(summed * P), micro_batches * sent(size * gathered))


def _gathered(config: Config, P: int, vocabulary_size: int, reused_within: int) -> int:
    """Elements that stage 3 gathers in a micro-batch: all forward, and backward what it let go since.

    It lets go what is used again after more than `reused_within` elements. On the way back each block lies behind
    what is above it twice, or three times where blocks are computed again.
    """
    kept = reused_within // (3 if config.model.activation_checkpointing else 2)
    return P + max(0, P - kept)

"""How much memory a training step needs, before it is tried: the estimate, the stage that fits, what to change.

P parameters, N ranks. In bf16 with AdamW: 2 P of parameters, 2 P to 6 P of gradients, 12 P of float32 masters and
moments, which ZeRO shares out over the ranks stage by stage (Rajbhandari et al. 2020, arXiv 1910.02054, table 1; here
with DeepSpeed 0.19's buffers as its sources allocate them). Activations: train/activations.py.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch

from mmtrain.config import Config, UserError
from mmtrain.models import count_parameters
from mmtrain.train.activations import (
    Precision,
    backward_of_block,
    has_dense_mask,
    kept_around_blocks,
    kept_by_block,
)

USABLE = 0.9  # the rest: fragments, the libraries' own buffers, work spaces of products
BUCKET = 50_000_000  # elements that DeepSpeed reduces at a time, as in engine.deepspeed_config
GATHERED = 1_000_000_000  # elements that stage 3 keeps gathered, DeepSpeed's stage3_max_live_parameters
FLATTENED = 500_000_000  # elements that stage 0 reduces at a time, DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE
INPUT_BYTES = 48  # of a token: three int64, three int32, a float32 and what is made of them
NO_MEMORY = re.compile(r"can't allocate memory|out of memory|ALLOC_FAILED|bad_alloc", re.IGNORECASE)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the moment of a step when its device holds most; `offloaded` and the snapshot on the host.

    parameters: with what ZeRO-3 gathers and autocast casts. activations: what the forward pass keeps, gradients of
    activations, inputs and mask. logits: of a chunk, with the gradient of the head's weight. buffers: of collectives
    and of the update. checkpoint_snapshot: float32 parameters and moments, each rank its share.
    """

    parameters: int
    gradients: int
    masters_and_moments: int
    activations: int
    logits: int
    buffers: int
    offloaded: int
    checkpoint_snapshot: int

    @property
    def device_total(self) -> int:
        """Bytes on the device."""
        return sum(self.on_device.values())

    @property
    def host_total(self) -> int:
        """Bytes of host memory, the process itself and its data workers left out."""
        return self.offloaded + self.checkpoint_snapshot

    @property
    def on_device(self) -> dict[str, int]:
        """The consumers by name, largest first."""
        found = {k: n for k, n in asdict(self).items() if k not in ("offloaded", "checkpoint_snapshot")}
        return dict(sorted(found.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class States:
    """Bytes that do not depend on the batch: at rest, in the forward pass, and when all gradients are there."""

    parameters: int
    gathered: int
    accumulated: int
    gradients: int
    masters_and_moments: int
    buffers: int
    update: int
    offloaded: int = 0


def estimate(
    config: Config,
    vocabulary_size: int,
    positions: int,
    ranks: int,
    stage: int | None,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    device: str = "cuda",
) -> Memory:
    """Memory of one rank at the peak of a training step.

    stage: of ZeRO, None for DDP; positions: of the model (`num_positions`); ranks: over which ZeRO shares out.
    """
    P = count_parameters(config.model, vocabulary_size, positions)
    precision = Precision.of(config, stage is None)
    share = config.stream.global_batch // ranks
    rows = config.engine.micro_batch or share
    head = vocabulary_size * config.model.width
    is_accumulated = rows < share
    if stage is None:
        states = _ddp(config, P, head, ranks, is_accumulated, device)
    else:
        states = _zero(P, ranks, stage, precision.parameter, is_accumulated, offload_optimizer, offload_parameters)

    layers, chunk = config.model.layers, min(config.model.loss_chunk, rows * config.stream.sequence_length)
    stream = rows * config.stream.sequence_length * config.model.width * precision.stream
    block = kept_by_block(config, rows, precision, device)
    # The last block is recomputed while the inputs of all others wait.
    kept, recomputed = (layers * stream, block) if config.model.activation_checkpointing else (layers * block, 0)
    around = kept_around_blocks(config, rows, precision, device) + share * config.stream.sequence_length * INPUT_BYTES
    backward = backward_of_block(config, rows, precision)
    logits = chunk * vocabulary_size * (4 if precision.product == 4 else 4 + precision.product)
    head_gradient = head * (4 if precision.parameter == 4 else 4 + precision.parameter)
    cast = 2 * (P if config.model.tie_embeddings else P - head) if precision.is_autocast else 0
    parameters = states.parameters + states.gathered

    def at(parameters: int, gradients: int, activations: int, logits: int, buffers: int) -> Memory:
        snapshot = 12 * P // ranks
        moments, moved = states.masters_and_moments, states.offloaded
        return Memory(parameters, gradients, moments, activations, logits, buffers, moved, snapshot)

    return max(
        # the head, at the end of the forward pass
        at(parameters + cast, states.accumulated, kept + around + stream, logits + head_gradient, states.buffers),
        # the last block's backward pass, when no other block has given its activations back
        at(
            parameters + (0 if recomputed else cast),
            states.accumulated,
            kept + recomputed + around + backward,
            head * precision.parameter,
            states.buffers,
        ),
        # the end of the backward pass: the gradients of the embedding, as head and as table
        at(parameters, states.gradients, around + backward, head * precision.parameter, states.buffers),
        at(states.parameters, states.gradients, around, 0, states.buffers + states.update),
        key=lambda memory: memory.device_total,
    )


def _ddp(config: Config, P: int, head: int, ranks: int, is_accumulated: bool, device: str) -> States:
    """float32 parameters and gradients on every rank, reduced in buckets that are copies of the gradients."""
    moments = 8 * P
    if config.optim.kind == "muon":  # one moment, of a matrix of the blocks on one rank alone
        blocks = P - head * (1 if config.model.tie_embeddings else 2)
        moments = 8 * (P - blocks) + 4 * blocks // ranks
    buckets = 4 * P if ranks > 1 else 0
    # AdamW is fused on CUDA, and takes a matrix at a time elsewhere.
    update = 0 if device == "cuda" else 8 * head
    return States(4 * P, 0, 4 * P if is_accumulated else 0, 4 * P, moments, buckets, update)


def _zero(
    P: int, N: int, stage: int, size: int, is_accumulated: bool, offload_optimizer: bool, offload_parameters: bool
) -> States:
    """DeepSpeed, by stage; size: bytes of a parameter."""
    if stage == 0:
        return States(4 * P, 0, 4 * P if is_accumulated else 0, 4 * P, 8 * P, 0, 4 * min(P, FLATTENED))
    bucket = BUCKET * (size if size == 4 else size + 4)  # reduced in float32
    masters_and_moments, offloaded = 12 * P // N, 0
    update = 4 * P // N
    if stage == 1 and size == 2 and not offload_optimizer:
        # BF16_Optimizer: float32 gradients of all parameters, besides those in bf16
        accumulated = gradients = 6 * P
        bucket = update = 0
    elif stage == 1:
        gradients = (4 if size == 2 else size) * P + (0 if offload_optimizer else 4 * P // N)
        accumulated = gradients if is_accumulated else 0
    elif stage == 2:
        gradients = 4 * P // N if size == 2 else 8 * P // N
        accumulated = gradients if is_accumulated else 0
    else:
        accumulated = gradients = 4 * P // N
    if offload_optimizer:
        offloaded = masters_and_moments + 4 * P // N
        gradients, accumulated = (gradients, accumulated) if stage == 1 else (0, 0)
        masters_and_moments = update = 0
    parameters, gathered = size * P, 0
    if stage == 3:
        parameters, gathered = size * P // N, size * min(P, GATHERED) if N > 1 else 0
    if offload_parameters:
        parameters, gathered, offloaded = 0, size * min(P, GATHERED), offloaded + size * P // N
    return States(parameters, gathered, accumulated, gradients, masters_and_moments, bucket, update, offloaded)

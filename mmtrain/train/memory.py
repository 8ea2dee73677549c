"""How much memory a training step needs, before it is tried: the estimate, the stage that fits, what to change.

P parameters, N ranks. In bf16 with AdamW: 2 P of parameters, 2 P to 6 P of gradients, 12 P of float32 masters and
moments, which ZeRO shares out over the ranks stage by stage (Rajbhandari et al. 2020, arXiv 1910.02054, table 1; here
with DeepSpeed 0.19's buffers as its sources allocate them). Activations: train/activations.py.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import psutil
import torch

from mmtrain.config import Config, UserError
from mmtrain.models import count_parameters
from mmtrain.train.activations import Precision, backward_of_block, kept_around_blocks, kept_by_block
from mmtrain.train.distributed import World

USABLE = 0.9  # the rest: fragments, the libraries' own buffers, work spaces of products
BUCKET = 50_000_000  # elements that DeepSpeed reduces at a time, as deepspeed_config says
GATHERED = 1_000_000_000  # elements that stage 3 keeps gathered: stage3_max_live_parameters
PREFETCHED = 50_000_000  # elements that stage 3 gathers at a time, then copies: stage3_prefetch_bucket_size
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
    copied: int = 0
    """Of the bucket, in the type that is summed: while it is summed, which a small model first does at the end."""


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
    resting = states.buffers if stage in (None, 3) else 0  # others allocate their bucket for each backward pass

    def at(parameters: int, gradients: int, activations: int, logits: int, buffers: int) -> Memory:
        snapshot = 12 * P // ranks
        moments, moved = states.masters_and_moments, states.offloaded
        return Memory(parameters, gradients, moments, activations, logits, buffers, moved, snapshot)

    return max(
        # the start: the model is built in float32 on every rank
        Memory(4 * P, 0, 0, 0, 0, 0, states.offloaded, 12 * P // ranks),
        # the head, at the end of the forward pass
        at(parameters + cast, states.accumulated, kept + around + stream, logits + head_gradient, resting),
        # the last block's backward pass, when no other block has given its activations back
        at(
            parameters + (0 if recomputed else cast),
            states.accumulated,
            kept + recomputed + around + backward,
            head * precision.parameter,
            states.buffers + (states.copied if P > BUCKET else 0),
        ),
        # the first block's backward pass, when all other gradients are there
        at(parameters, states.gradients, around + block + backward, 0, states.buffers + states.copied),
        # the embedding's, whose gradient as a table is added to that as the head
        at(
            parameters,
            states.gradients,
            around + stream,
            head * precision.parameter,
            states.buffers + states.copied,
        ),
        # the update
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
    bucket, copied = BUCKET * size, 4 * min(P, BUCKET) if size == 2 else 0
    masters_and_moments, offloaded = 12 * P // N, 0
    update = 4 * P // N
    if stage == 1 and size == 2 and not offload_optimizer:
        # BF16_Optimizer: float32 gradients of all parameters, besides those in bf16
        accumulated = gradients = 6 * P
        bucket = copied = update = 0
    elif stage == 1:
        gradients = (4 if size == 2 else size) * P + (0 if offload_optimizer else 4 * P // N)
        accumulated = gradients if is_accumulated else 0
    elif stage == 2:
        gradients = 4 * P // N if size == 2 else 8 * P // N
        accumulated = gradients if is_accumulated else 0
    else:
        accumulated = gradients = 4 * P // N
        bucket, copied = BUCKET * 4 + size * min(P, PREFETCHED), 0
    if offload_optimizer:
        offloaded = masters_and_moments + 4 * P // N
        gradients, accumulated = (gradients, accumulated) if stage == 1 else (0, 0)
        masters_and_moments = update = 0
    parameters, gathered = size * P, 0
    if stage == 3:
        parameters, gathered = size * P // N, size * min(P, GATHERED) if N > 1 else 0
    if offload_parameters:
        parameters, gathered, offloaded = 0, size * min(P, GATHERED), offloaded + size * P // N
    return States(parameters, gathered, accumulated, gradients, masters_and_moments, bucket, update, offloaded, copied)


def available_bytes(world: World) -> int:
    """Free memory of the rank that has least, before its model is built; all ranks must call."""
    if world.device.type == "cuda":
        own = torch.cuda.mem_get_info(world.device)[0]
    else:  # torchrun and DeepSpeed's launcher name the ranks of a host differently
        local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world.size
        own = psutil.virtual_memory().available // int(local)
    return min(world.gather(own))


def choose_stage(
    config: Config,
    vocabulary_size: int,
    positions: int,
    ranks: int,
    available_bytes: int,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    device: str = "cuda",
) -> tuple[int, str]:
    """The cheapest ZeRO stage whose estimate fits in 90 % of what the smallest rank has, and a sentence that says why.

    Raises UserError with the largest consumers and what to change where none fits.
    """
    first = 3 if offload_parameters else 1 if offload_optimizer or config.engine.dtype != "fp32" else 0
    before = ""
    for stage in range(first, 4):
        setup = Setup(config, vocabulary_size, positions, ranks, stage, offload_optimizer, offload_parameters, device)
        if setup.needed <= USABLE * available_bytes:
            return stage, f"stage {stage}: {gib(setup.needed)} of {gib(available_bytes)} per rank{before}"
        before = f"; stage {stage} would need {gib(setup.needed)}"
    raise UserError(
        f"no ZeRO stage fits in {USABLE:.0%} of {gib(available_bytes)} per rank: stage 3 needs {setup.describe()}; "
        f"{setup.advice()}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, its libraries or the host ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def out_of_memory(
    error: BaseException,
    config: Config,
    vocabulary_size: int,
    positions: int,
    ranks: int,
    stage: int | None,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    device: str = "cuda",
) -> str:
    """The sentence for an error of `is_out_of_memory`: what needs most by the estimate, and what to change."""
    setup = Setup(config, vocabulary_size, positions, ranks, stage, offload_optimizer, offload_parameters, device)
    tried = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    asked = f" when it asked for {tried[1]} more" if tried else ""
    return f"out of memory{asked}; a step of this run is estimated at {setup.describe()}; {setup.advice()}"


@dataclass(frozen=True)
class Setup:
    """The arguments of `estimate`, to be changed one at a time."""

    config: Config
    vocabulary_size: int
    positions: int
    ranks: int
    stage: int | None
    offload_optimizer: bool
    offload_parameters: bool
    device: str

    @property
    def memory(self) -> Memory:
        """The estimate."""
        return estimate(**{field.name: getattr(self, field.name) for field in fields(self)})

    @property
    def needed(self) -> int:
        """Bytes of a rank where it trains; on a CPU the host's are the same memory."""
        memory = self.memory
        return memory.device_total + (memory.host_total if self.device == "cpu" else 0)

    def describe(self) -> str:
        """The total per rank, and the three largest consumers."""
        memory = self.memory
        consumers = memory.on_device | ({"the checkpoint": memory.checkpoint_snapshot} if self.device == "cpu" else {})
        largest = sorted(consumers.items(), key=lambda item: -item[1])[:3]
        return f"{gib(self.needed)} per rank, " + ", ".join(f"{k.replace('_', ' ')} {gib(n)}" for k, n in largest if n)

    def advice(self) -> str:
        """The settings that would save more than 1 %, with the total each would come to, best first."""
        totals = [(other.needed, setting) for setting, other in self.alternatives()]
        helps = [f"{setting} ({gib(total)})" for total, setting in sorted(totals) if total < 0.99 * self.needed]
        return f"what would need less: {', '.join(helps)}" if helps else "train on more ranks, or a smaller model"

    def alternatives(self) -> Iterator[tuple[str, "Setup"]]:
        """Single settings to change, each with what it makes of this."""
        c, e = self.config, self.config.engine
        share = c.stream.global_batch // self.ranks
        rows = e.micro_batch or share
        if rows > 1:
            fewer = max(n for n in range(1, rows // 2 + 1) if share % n == 0)
            yield f"engine.micro_batch={fewer}", self._with(engine=replace(e, micro_batch=fewer))
        if not c.model.activation_checkpointing:
            setting = "model.activation_checkpointing=true"
            yield setting, self._with(model=replace(c.model, activation_checkpointing=True))
        if self.stage is None:
            yield "engine=deepspeed", replace(self, stage=1)
        for stage in range((self.stage or 0) + 1, 4) if self.stage is not None else ():
            yield f"engine.stage={stage}", replace(self, stage=stage)
        if self.stage and not self.offload_optimizer:
            yield "engine.offload_optimizer=true", replace(self, offload_optimizer=True)
        if self.stage == 3 and not self.offload_parameters:
            yield "engine.offload_parameters=true", replace(self, offload_parameters=True)
        if c.model.loss_chunk > 128:
            chunk = c.model.loss_chunk // 2
            yield f"model.loss_chunk={chunk}", self._with(model=replace(c.model, loss_chunk=chunk))
        length = c.stream.sequence_length // 2
        yield f"stream.sequence_length={length}", self._with(stream=replace(c.stream, sequence_length=length))

    def _with(self, **changes: Any) -> "Setup":
        return replace(self, config=replace(self.config, **changes))


def gib(count: int) -> str:
    """Bytes for a sentence."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"

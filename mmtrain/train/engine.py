"""DeepSpeed ZeRO and plain DDP behind one small interface.

The state of an engine is a list of fragments (`train.fragments`), so that a checkpoint does not know about stages or
world sizes.
"""

from typing import Any, Protocol

from torch import Tensor, nn

from mmtrain.config import Config
from mmtrain.models import LossSums
from mmtrain.train.ddp import DdpEngine
from mmtrain.train.distributed import World
from mmtrain.train.fragments import Fragment
from mmtrain.train.zero import DeepSpeedEngine


class Engine(Protocol):
    """What the loop needs of a training backend."""

    def effective(self) -> dict[str, Any]:
        """What the backend really does, JSON-able; DeepSpeed's settings are those that it parsed."""
        ...

    def forward(self, batch: dict[str, Tensor]) -> LossSums:
        """Loss sums of a micro-batch."""
        ...

    def backward(self, total: Tensor, global_weight: Tensor) -> None:
        """Accumulate the gradient of total / global_weight, summed over ranks and micro-batches."""
        ...

    def step(self, lr: float) -> Tensor | float | None:
        """Reduce, clip, update; returns the gradient norm before clipping (None when unknown).

        A norm that is not finite: this update was skipped on all ranks; parameters and moments are as before.
        """
        ...

    def set_training(self, is_training: bool) -> None:
        """Switch what differs between training and evaluation (dropout)."""
        ...

    def owned(self) -> list[Fragment]:
        """What this rank has to save: over all ranks every element exactly once."""
        ...

    def held(self) -> list[Fragment]:
        """What this rank needs to go on: `owned`, or all where every rank holds all."""
        ...

    def updates(self) -> int:
        """Updates that AdamW made: steps less those skipped for a gradient that was not finite."""
        ...

    def restored(self, updates: int) -> None:
        """After all of `held` was written into: go on as after `updates` updates; all ranks must call."""
        ...


def build_engine(model: nn.Module, config: Config, world: World, accumulation: int) -> Engine:
    """The engine of `config.engine` around an initialized model; `accumulation` micro-batches per step."""
    if config.engine.kind == "ddp":
        return DdpEngine(model, config, world, accumulation)
    return DeepSpeedEngine(model, config, world, accumulation)

"""What the loop needs to know of a family of models: decoders of tokens, or the diffusion baseline on pictures."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mmtrain.config import Config
from mmtrain.flops import StepFlops
from mmtrain.stream import Batch, BatchCounts
from mmtrain.tokens import Vocabulary
from mmtrain.train.picture_learner import PictureLearner
from mmtrain.train.run import Artifacts
from mmtrain.train.token_learner import TokenLearner


class Learner(Protocol):
    """A family of models with its data; its module's `forward` takes the tensors of `inputs` and gives `LossSums`."""

    @property
    def num_parameters(self) -> int:
        """Of the model; nothing is allocated."""
        ...

    @property
    def num_sums(self) -> int:
        """How many sums `flops` needs."""
        ...

    def new_model(self) -> nn.Module:
        """An uninitialized model on the CPU, with `initialize(seed)`, `watch` and `take_signs` as of `models.Decoder`."""
        ...

    def inputs(self, batch: Batch, counts: BatchCounts, split: str) -> tuple[dict[str, Tensor], np.ndarray]:
        """A batch of a split on the device, and (num_sums,) int64 sums over it, which add up over steps and ranks.

        All tensors have the same first dimension, along which micro-batches are cut; loss_weight sums to the weight.
        """
        ...

    def flops(self, sums: np.ndarray, tokens: dict[str, int], rows: int) -> tuple[StepFlops, dict[str, int]]:
        """FLOPs of training steps with these sums, and how those of the model are shared among the kinds of tokens.

        tokens: by kind; rows: of `stream.sequence_length` positions.
        """
        ...


def open_learner(config: Config, artifacts: Artifacts, vocabulary: Vocabulary, device: torch.device) -> Learner:
    """The learner that `model.family` asks for."""
    if config.model.is_diffusion:
        return PictureLearner(config, artifacts, vocabulary, device)
    return TokenLearner(config, vocabulary, device)

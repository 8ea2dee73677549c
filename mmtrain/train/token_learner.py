"""Decoders of tokens, as the loop sees them (`train.learner`)."""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from mmtrain.config import Config
from mmtrain.flops import StepFlops, flops_from_sums, split_by_kind
from mmtrain.models import Decoder, build_model, count_parameters, document_starts, num_positions
from mmtrain.stream import Batch, BatchCounts
from mmtrain.tokens import Vocabulary


@dataclass(frozen=True)
class TokenLearner:
    """Next-token prediction on the packed rows of the stream; sums: squared lengths, computed scores."""

    config: Config
    vocabulary: Vocabulary
    device: torch.device
    num_sums: int = 2

    @property
    def num_parameters(self) -> int:
        return count_parameters(self.config.model, self.vocabulary.size, num_positions(self.config))

    def new_model(self) -> Decoder:
        return build_model(self.config.model, self.vocabulary.size, num_positions(self.config))

    def inputs(self, batch: Batch, counts: BatchCounts, split: str) -> tuple[dict[str, Tensor], np.ndarray]:
        attention = self.config.model.attention
        sums = work_sums(counts, self.config.stream.sequence_length, attention, self.device.type)
        return model_inputs(batch, self.vocabulary, self.device, attention), sums

    def flops(self, sums: np.ndarray, tokens: dict[str, int], rows: int) -> tuple[StepFlops, dict[str, int]]:
        squares, scores = sums.tolist()
        row_length = self.config.stream.sequence_length
        flops = flops_from_sums(
            self.config.model,
            self.vocabulary.size,
            sum(tokens.values()),
            squares,
            rows,
            row_length,
            computed_squares=scores,
        )
        return flops, split_by_kind(flops.model_causal, tokens)


def work_sums(counts: BatchCounts, row_length: int, attention: str, device_type: str) -> np.ndarray:
    """(2,) int64: squared lengths of the documents, and scores that the attention computes."""
    squares = np.square(counts.lengths).sum()
    scores = counts.rows * row_length**2
    if attention in ("flex", "varlen"):
        scores = squares // 2
    elif attention == "auto" and device_type == "cpu":
        # as models.pack_documents decides (for the whole share of the rank)
        scores = min(scores, len(counts.lengths) * int(counts.lengths.max(initial=0)) ** 2)
    return np.array([squares, scores])


def model_inputs(
    batch: Batch, vocabulary: Vocabulary, device: torch.device, attention: str = "auto"
) -> dict[str, Tensor]:
    """The batch on the device, with the modality of every target, and what the backend of `model.attention` needs."""
    tensors = cast(dict[str, Tensor], batch)
    if attention == "varlen":
        tensors = tensors | {"starts": document_starts(tensors["document"])}
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    inputs["modality"] = vocabulary.modality(inputs["targets"])
    return inputs

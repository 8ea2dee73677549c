"""Packed rows as tensors, and what is in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch

from mmtrain.objective import NO_CELL, TrainingSequence
from mmtrain.tokens import MODALITIES, Vocabulary

KINDS = (*MODALITIES, "retrieved")


class Batch(TypedDict):
    """Torch tensors on the CPU, all (B, S).

    tokens: int64. targets: int64, the next token inside the document. loss_weight: float32, 0 at the last token of
    a document and on padding. document: int32, number within the row from 0, -1 on padding. position: int32, from 0
    in every document. cell: int32, place of an image token in its picture in raster order, else -1. Padding has `<pad>`
    as token and as target.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    loss_weight: torch.Tensor
    document: torch.Tensor
    position: torch.Tensor
    cell: torch.Tensor


@dataclass(frozen=True)
class BatchCounts:
    """What the rows of one rank hold in one step."""

    padding: float
    """Share of the positions that hold no document."""
    tokens: dict[str, int]
    """Tokens by kind: text, image, special (sentinels among them); retrieved = any token of a retrieved document."""
    lengths: np.ndarray
    """(documents,) int64, length of every packed document: attention costs the sum of their squares."""
    truncated: int
    """Documents that lost segments because they were longer than a row."""
    dropped_retrieved: int
    """Retrieved documents left out because they did not fit."""

    @property
    def documents(self) -> int:
        """Documents packed into the rows."""
        return len(self.lengths)


def collate(
    rows: Sequence[Sequence[TrainingSequence]], sequence_length: int, vocabulary: Vocabulary
) -> tuple[Batch, BatchCounts]:
    """Lay the sequences of each row side by side; each row's lengths add up to at most `sequence_length`."""
    shape = (len(rows), sequence_length)
    tokens = np.full(shape, vocabulary.pad, dtype=np.int64)
    targets = np.full(shape, vocabulary.pad, dtype=np.int64)
    loss_weight = np.zeros(shape, dtype=np.float32)
    document = np.full(shape, -1, dtype=np.int32)
    position = np.zeros(shape, dtype=np.int32)
    cell = np.full(shape, NO_CELL, dtype=np.int32)
    is_retrieved = np.zeros(shape, dtype=bool)
    for i, row in enumerate(rows):
        start = 0
        for number, sequence in enumerate(row):
            end = start + len(sequence)
            tokens[i, start:end] = sequence.tokens
            targets[i, start : end - 1] = sequence.tokens[1:]
            loss_weight[i, start:end] = sequence.loss_weight
            document[i, start:end] = number
            position[i, start:end] = np.arange(len(sequence))
            cell[i, start:end] = sequence.cell
            is_retrieved[i, start:end] = sequence.is_retrieved
            start = end
    is_document = document >= 0
    kind = np.where(is_retrieved, KINDS.index("retrieved"), vocabulary.modality(tokens))[is_document]
    by_kind = np.bincount(kind, minlength=len(KINDS)).tolist()
    sequences = [sequence for row in rows for sequence in row]
    counts = BatchCounts(
        padding=1.0 - float(is_document.mean()),
        tokens=dict(zip(KINDS, by_kind, strict=True)),
        lengths=np.array([len(sequence) for sequence in sequences], dtype=np.int64),
        truncated=sum(sequence.truncated for sequence in sequences),
        dropped_retrieved=sum(sequence.dropped_retrieved for sequence in sequences),
    )
    batch = Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        loss_weight=torch.from_numpy(loss_weight),
        document=torch.from_numpy(document),
        position=torch.from_numpy(position),
        cell=torch.from_numpy(cell),
    )
    return batch, counts

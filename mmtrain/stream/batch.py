"""Packed rows as tensors, and what is in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict, cast

import numpy as np
import torch

from mmtrain.objective import NO_CELL, TrainingSequence
from mmtrain.tokens import MODALITIES, Vocabulary

KINDS = (*MODALITIES, "retrieved")
RETRIEVED = KINDS.index("retrieved")
CACHE = ("cache_hits", "cache_misses", "downloaded_bytes")
COLUMNS = ("documents", "sequences", "split_documents", "dropped_retrieved", *KINDS, *CACHE, "taken")
"""What is counted for each source: documents begun in these rows, their training sequences, documents split into
windows, retrieved documents left out because they did not fit, tokens by kind, what the store did since the last batch
(0 for local folders), and documents that the lanes of these rows have taken since the start of the run, summed over
the rows."""
FIRST_KIND = COLUMNS.index(KINDS[0])


class Batch(TypedDict):
    """Torch tensors on the CPU, all (B, S) but origin.

    tokens: int64. targets: int64, the next token inside the document. loss_weight: float32, 0 at the last token of
    a document and on padding. document: int32, number within the row from 0, -1 on padding. position: int32, from 0
    in every document. cell: int32, place of an image token in its picture in raster order, else -1. Padding has `<pad>`
    as token and as target. origin: (B, S, 3) int64, only where the stream was asked for it: number of the source, epoch
    and index of the document that begins here, else -1 (also where only a later window of it begins).
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    loss_weight: torch.Tensor
    document: torch.Tensor
    position: torch.Tensor
    cell: torch.Tensor
    origin: NotRequired[torch.Tensor]


@dataclass(frozen=True)
class BatchCounts:
    """What the rows of one rank hold in one step."""

    rows: int
    by_source: np.ndarray
    """(sources, len(COLUMNS)) int64, sources in the order of the stream."""
    lengths: np.ndarray
    """(sequences,) int64, length of every packed sequence: attention costs the sum of their squares."""
    positions: int
    """Tokens and padding: rows times their length."""
    seconds: float = 0.0
    """Time that it took to make the batch."""

    def total(self, column: str) -> int:
        """One of COLUMNS summed over all sources."""
        return int(self.by_source[:, COLUMNS.index(column)].sum())

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens by kind: text, image, special (with sentinels); retrieved = any token of a retrieved document."""
        return {kind: self.total(kind) for kind in KINDS}

    @property
    def padding(self) -> float:
        """Share of the positions that hold no document."""
        return 1.0 - float(self.lengths.sum()) / self.positions


def collate(
    rows: Sequence[Sequence[TrainingSequence]],
    sources: Sequence[Sequence[int]],
    num_sources: int,
    sequence_length: int,
    vocabulary: Vocabulary,
) -> tuple[Batch, BatchCounts]:
    """Lay the sequences of each row side by side; each row's lengths add up to at most `sequence_length`.

    sources: for every sequence the number of its source. The columns after the tokens are left 0.
    """
    shape = (len(rows), sequence_length)
    tokens = np.full(shape, vocabulary.pad, dtype=np.int64)
    targets = np.full(shape, vocabulary.pad, dtype=np.int64)
    loss_weight = np.zeros(shape, dtype=np.float32)
    document = np.full(shape, -1, dtype=np.int32)
    position = np.zeros(shape, dtype=np.int32)
    cell = np.full(shape, NO_CELL, dtype=np.int32)
    kind = np.full(shape, -1, dtype=np.int64)
    by_source = np.zeros((num_sources, len(COLUMNS)), dtype=np.int64)
    places = np.arange(sequence_length, dtype=np.int32)
    for i, row in enumerate(rows):
        start = 0
        for number, (sequence, source) in enumerate(zip(row, sources[i], strict=True)):
            end = start + len(sequence)
            tokens[i, start:end] = sequence.tokens
            targets[i, start : end - 1] = sequence.tokens[1:]
            loss_weight[i, start:end] = sequence.loss_weight
            document[i, start:end] = number
            position[i, start:end] = places[: end - start]
            cell[i, start:end] = sequence.cell
            kind[i, start:end] = np.where(sequence.is_retrieved, RETRIEVED, 0) + source * len(KINDS)
            is_first, is_split = sequence.window == 0, sequence.num_windows > 1
            by_source[source, :4] += (is_first, 1, is_first and is_split, sequence.dropped_retrieved)
            start = end
    is_document = document >= 0
    is_retrieved = kind % len(KINDS) == RETRIEVED
    kind += np.where(is_retrieved, 0, vocabulary.modality(tokens))
    by_kind = np.bincount(kind[is_document], minlength=num_sources * len(KINDS))
    by_source[:, FIRST_KIND : FIRST_KIND + len(KINDS)] = by_kind.reshape(num_sources, len(KINDS))
    counts = BatchCounts(
        rows=len(rows),
        by_source=by_source,
        lengths=np.array([len(sequence) for row in rows for sequence in row], dtype=np.int64),
        positions=len(rows) * sequence_length,
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


def origins(rows: Sequence[Sequence[tuple[TrainingSequence, int, int, int]]], sequence_length: int) -> torch.Tensor:
    """`origin` of a batch; rows: of every packed sequence itself, the number of its source, its epoch and index."""
    origin = np.full((len(rows), sequence_length, 3), -1, dtype=np.int64)
    for i, row in enumerate(rows):
        start = 0
        for sequence, *where in row:
            if sequence.window == 0:
                origin[i, start] = where
            start += len(sequence)
    return torch.from_numpy(origin)


def interleave(parts: Sequence[tuple[Batch, BatchCounts]]) -> tuple[Batch, BatchCounts]:
    """Put together the batches of n parts, of which part k holds rows k, k + n, k + 2n, ..."""
    if len(parts) == 1:
        return parts[0]
    rows = sum(counts.rows for _, counts in parts)
    batch = cast(Batch, {})
    for name, like in cast(dict[str, torch.Tensor], parts[0][0]).items():
        whole = torch.empty((rows, *like.shape[1:]), dtype=like.dtype)
        for k, (part, _) in enumerate(parts):
            whole[k :: len(parts)] = part[name]  # type: ignore[literal-required]
        batch[name] = whole  # type: ignore[literal-required]
    counts = BatchCounts(
        rows=rows,
        by_source=np.sum([counts.by_source for _, counts in parts], axis=0),
        lengths=np.concatenate([counts.lengths for _, counts in parts]),
        positions=sum(counts.positions for _, counts in parts),
        seconds=max(counts.seconds for _, counts in parts),
    )
    return batch, counts

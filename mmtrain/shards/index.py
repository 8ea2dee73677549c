"""The index of a shard: where each document's bytes are in the tar. Arrays only, never pickled objects."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mmtrain.config import UserError


@dataclass(frozen=True)
class ShardIndex:
    """n documents with m parts in all; a part is a picture, or the bytes of the token ids (after the .npy header).

    ids: (n,) fixed-width bytes, ASCII. json: (n, 2) int64 offset and size in bytes of KEY.json.
    parts: (m, 2) int64 offset and size in bytes. part_start: (n + 1,) int64, document i has parts
    part_start[i]:part_start[i + 1]. segments: (k, 3) int32 modality, start, length in tokens; segment_start like
    part_start (both empty of rows in document shards).
    """

    ids: np.ndarray
    json: np.ndarray
    parts: np.ndarray
    part_start: np.ndarray
    segments: np.ndarray
    segment_start: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


# Dimensions, and columns of the last.
_SHAPES = {"ids": (1, 0), "json": (2, 2), "parts": (2, 2), "part_start": (1, 0)}
_SHAPES |= {"segments": (2, 3), "segment_start": (1, 0)}


def build_index(
    ids: list[str],
    json: list[tuple[int, int]],
    parts: list[list[tuple[int, int]]],
    segments: list[list[tuple[int, int, int]]],
) -> ShardIndex:
    """One entry per document in each list."""

    def ragged(rows: list[list[tuple]], columns: int, dtype: type) -> tuple[np.ndarray, np.ndarray]:
        flat = [item for row in rows for item in row]
        start = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        return np.array(flat, dtype).reshape(-1, columns), start

    parts_array, part_start = ragged(parts, 2, np.int64)
    segments_array, segment_start = ragged(segments, 3, np.int32)
    return ShardIndex(
        np.array([id.encode("ascii") for id in ids], dtype=np.bytes_),
        np.array(json, np.int64).reshape(-1, 2),
        parts_array,
        part_start,
        segments_array,
        segment_start,
    )


def save_index(path: Path, index: ShardIndex) -> None:
    """Write the index; equal indices give equal bytes (numpy's zip members carry a fixed date)."""
    with open(path, "wb") as file:
        np.savez(file, **{field.name: getattr(index, field.name) for field in fields(index)})


def load_index(path: Path | str, shard_bytes: int, documents: int, file: BinaryIO | None = None) -> ShardIndex:
    """Read an index and check that it describes `documents` documents inside a tar of `shard_bytes` bytes.

    file: the index, open, where `path` is only its name for messages. Raises UserError naming it if it is damaged.
    """
    try:
        with np.load(file or path, allow_pickle=False) as content:
            members = content.zip.infolist()
            if any(member.compress_type for member in members):
                raise ValueError("it is compressed")  # and could fill the memory
            index = ShardIndex(**{field.name: content[field.name] for field in fields(ShardIndex)})
    except Exception as error:  # zipfile and numpy have many ways to meet damage
        raise UserError(f"cannot read the shard index {path} ({error}); write the shards again") from error
    fault = _fault(index, shard_bytes, documents)
    if fault:
        raise UserError(f"the shard index {path} is damaged ({fault}); write the shards again")
    return index


def _fault(index: ShardIndex, shard_bytes: int, documents: int) -> str:
    """What is wrong with an index, or ""."""
    for name, (dimensions, columns) in _SHAPES.items():
        array = getattr(index, name)
        wrong_columns = columns and array.shape[-1:] != (columns,)
        if array.ndim != dimensions or wrong_columns or array.dtype.kind != ("S" if name == "ids" else "i"):
            return f"{name} has type {array.dtype} and shape {array.shape}"
    if len(index) != documents or len(index.json) != documents:
        return f"{len(index)} documents instead of {documents}"
    for start, rows in ((index.part_start, index.parts), (index.segment_start, index.segments)):
        if len(start) != documents + 1 or start[0] != 0 or start[-1] != len(rows) or (np.diff(start) < 0).any():
            return "its rows do not add up"
    for spans in (index.json, index.parts):
        offset, size = spans[:, 0], spans[:, 1]
        # Not offset + size: of a hostile file, that overflows.
        if ((offset < 0) | (size < 0) | (size > shard_bytes) | (offset > shard_bytes - size)).any():
            return "a document lies outside the shard"
    return ""

"""Read shards by index: one memory map per shard, no parsing of tars, no copies of token ids."""

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmtrain.config import UserError
from mmtrain.documents import Document, Image
from mmtrain.documents.tars import BLOCK_BYTES
from mmtrain.shards.index import ShardIndex, load_index
from mmtrain.shards.manifest import DOCUMENTS, TOKENS, VOCABULARY, index_name, open_manifest
from mmtrain.tokens import MODALITIES, TokenSegment, Vocabulary


class _Shards:
    """What both kinds of shards share: documents 0..n-1 in writing order, found by index or by id."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = Path(folder)
        self.manifest = open_manifest(self.folder, kind)
        self._indices: list[ShardIndex] = [
            load_index(self.folder / index_name(shard.name), shard.bytes, shard.documents)
            for shard in self.manifest.shards
        ]
        self._start = np.concatenate([[0], np.cumsum([len(index) for index in self._indices])]).astype(np.int64)
        self._maps: dict[int, mmap.mmap] = {}
        self._sorted_ids: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.manifest.documents

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # a memory map cannot travel to another process; it is opened again there

    def _locate(self, i: int) -> tuple[int, int]:
        """Shard number and row of document i."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)} in {self.folder}")
        shard = int(np.searchsorted(self._start, i, side="right")) - 1
        return shard, int(i - self._start[shard])

    def _map(self, shard: int) -> mmap.mmap:
        """Memory map of a shard, opened on first use."""
        if shard not in self._maps:
            with open(self.folder / self.manifest.shards[shard].name, "rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[shard]

    def _json(self, shard: int, row: int) -> dict[str, Any]:
        offset, size = self._indices[shard].json[row]
        try:
            return json.loads(self._map(shard)[offset : offset + size])
        except ValueError as error:
            name = self.manifest.shards[shard].name
            raise UserError(
                f"document {row} of {self.folder / name} is damaged ({error}); write the shards again"
            ) from error

    def id(self, i: int) -> str:
        """Id of document i."""
        shard, row = self._locate(i)
        return self._indices[shard].ids[row].decode()

    def content(self, i: int) -> dict[str, Any]:
        """KEY.json of document i, without its pictures or tokens."""
        return self._json(*self._locate(i))

    def meta(self, i: int) -> dict[str, Any]:
        """The document's meta."""
        return self.content(i)["meta"]

    def place(self, i: int) -> tuple[Path, int, int]:
        """Where document i lies: its tar, and offset and size in bytes of all its members with their headers."""
        shard, row = self._locate(i)
        index = self._indices[shard]
        parts = index.parts[index.part_start[row] : index.part_start[row + 1]]
        start = int(index.json[row][0]) - BLOCK_BYTES
        end = max([int(index.json[row].sum()), *parts.sum(axis=1).tolist()])
        size = -(-(end - start) // BLOCK_BYTES) * BLOCK_BYTES  # members are padded to whole blocks
        return self.folder / self.manifest.shards[shard].name, start, size

    @property
    def part_bytes(self) -> np.ndarray:
        """Size of every picture (of every document's token ids) in bytes, in writing order: (m,) int64."""
        return np.concatenate([index.parts[:, 1] for index in self._indices])

    @property
    def ids(self) -> np.ndarray:
        """Ids of all documents: (n,) fixed-width bytes, ASCII."""
        return np.concatenate([index.ids for index in self._indices])

    def index_of(self, id: str) -> int:
        """Index of the document with this id. Raises KeyError if there is none."""
        if self._sorted_ids is None:
            ids = self.ids
            order = np.argsort(ids, kind="stable")
            self._sorted_ids = ids[order], order
        ids, order = self._sorted_ids
        key = id.encode()
        place = int(np.searchsorted(ids, key))
        if place == len(ids) or ids[place] != key:
            raise KeyError(id)
        return int(order[place])


class DocumentShards(_Shards):
    """Documents by index: a sequence of `Document`.

    Raises UserError at opening if the folder is incomplete or of another kind.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, DOCUMENTS)

    def __getitem__(self, i: int) -> Document:
        shard, row = self._locate(i)
        content = self._json(shard, row)
        index = self._indices[shard]
        parts = iter(index.parts[index.part_start[row] : index.part_start[row + 1]])
        segments: list[str | Image] = []
        for text, name, info in zip(content["texts"], content["images"], content["image_info"], strict=True):
            if name is None:
                segments.append(text)
                continue
            offset, size = next(parts)
            data = self._map(shard)[offset : offset + size]
            segments.append(Image(data, info["width"], info["height"], info["sha256"], name.rpartition(".")[2]))
        return Document(content["id"], content["source"], tuple(segments), content["meta"])

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))


class TokenShards(_Shards):
    """Token ids by document index, as views of the files.

    Raises UserError at opening if the folder is incomplete, of another kind, or its vocabulary was exchanged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, TOKENS)
        self.vocabulary = Vocabulary.load(self.folder / VOCABULARY)
        if self.vocabulary.fingerprint != self.manifest.fingerprints.get("vocabulary"):
            raise UserError(f"{self.folder / VOCABULARY} is not the vocabulary of these shards; write the shards again")
        self._dtype = np.dtype(self.manifest.dtype)
        if self._dtype != self.vocabulary.dtype or any(len(index.parts) != len(index) for index in self._indices):
            raise UserError(f"the manifest or an index in {self.folder} is damaged; write the shards again")
        self.lengths: np.ndarray = np.concatenate(
            [index.parts[:, 1] // self._dtype.itemsize for index in self._indices]
        )
        """(n,) int64 tokens of each document."""

    def tokens(self, i: int) -> np.ndarray:
        """Ids of document i: (length,) of the vocabulary's dtype, a read-only view of the memory-mapped shard."""
        shard, row = self._locate(i)
        offset, size = self._indices[shard].parts[row]
        return np.frombuffer(self._map(shard), self._dtype, int(size) // self._dtype.itemsize, int(offset))

    def segments(self, i: int) -> tuple[TokenSegment, ...]:
        """Text and image segments of document i."""
        shard, row = self._locate(i)
        index = self._indices[shard]
        rows = index.segments[index.segment_start[row] : index.segment_start[row + 1]].tolist()
        return tuple(TokenSegment(MODALITIES[kind], start, length) for kind, start, length in rows)

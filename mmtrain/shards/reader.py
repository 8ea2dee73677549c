"""Read shards by index: memory maps, no parsing of tars, no copies of token ids.

Opening reads the manifest alone; the index and the map of a shard are opened on first use, and the oldest are let go.
"""

import json
import mmap
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from mmtrain.config import StoreConfig, UserError
from mmtrain.documents import Document, Image
from mmtrain.documents.tars import BLOCK_BYTES
from mmtrain.shards.index import ShardIndex, load_index
from mmtrain.shards.manifest import DOCUMENTS, TOKENS, VOCABULARY, index_name, open_manifest
from mmtrain.shards.store import Store, open_store
from mmtrain.tokens import MODALITIES, TokenSegment, Vocabulary

_INDEX_BYTES = 1 << 30  # indices kept in memory: those of about 10 million documents
_MAPS = 256  # each holds a file descriptor, and 1,024 is a common limit


class _Shards:
    """What both kinds of shards share: documents 0..n-1 in writing order, found by index or by id.

    location: folder or URL. store: where to read it from, for other settings than those of StoreConfig().
    """

    def __init__(self, location: str | Path, kind: str, store: Store | None = None) -> None:
        self.store = store or open_store(location, StoreConfig())
        self.manifest = open_manifest(self.store, kind)
        self._start = [0, *accumulate(shard.documents for shard in self.manifest.shards)]
        self._close()

    def _close(self) -> None:
        """No shard is open."""
        self._indices: dict[int, ShardIndex] = {}
        self._index_bytes = 0
        self._maps: dict[int, mmap.mmap] = {}
        self._lock = threading.Lock()
        self._sorted_ids: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.manifest.documents

    def __getstate__(self) -> dict[str, Any]:
        """Open shards do not travel to another process; they are opened again there."""
        return {name: getattr(self, name) for name in self.__dict__ if name not in _OPEN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._close()

    def prefetch(self, indices: Iterable[int]) -> None:
        """Fetch the shards of these documents in the background, the first ones first (see `Store.prefetch`)."""
        shards = dict.fromkeys(self._locate(i)[0] for i in indices)
        infos = [self.manifest.shards[shard] for shard in shards if shard not in self._maps]
        self.store.prefetch(
            file
            for info in infos
            for file in (
                (index_name(info.name), info.index_bytes, info.index_sha256),
                (info.name, info.bytes, info.sha256),
            )
        )

    def _locate(self, i: int) -> tuple[int, int]:
        """Shard number and row of document i."""
        if not 0 <= i < self._start[-1]:
            raise IndexError(f"document {i} of {len(self)} in {self.store.location}")
        i = int(i)
        shard = bisect_right(self._start, i) - 1
        return shard, i - self._start[shard]

    def _index(self, shard: int) -> ShardIndex:
        """Index of a shard, loaded on first use."""
        index = self._indices.get(shard)
        return self._load_index(shard) if index is None else index

    def _load_index(self, shard: int) -> ShardIndex:
        info = self.manifest.shards[shard]
        name = index_name(info.name)
        where = self.store.where(name)
        try:
            with self.store.open(name, info.index_bytes, info.index_sha256) as file:
                index = load_index(where, info.bytes, info.documents, file)
        except OSError as error:
            raise UserError(f"cannot read the shard index {where} ({error}); write the shards again") from error
        self._check(index, where)
        with self._lock:
            if shard not in self._indices:
                self._indices[shard] = index
                self._index_bytes += info.index_bytes
            while self._index_bytes > _INDEX_BYTES and len(self._indices) > 1:
                oldest = next(iter(self._indices))
                del self._indices[oldest]
                self._index_bytes -= self.manifest.shards[oldest].index_bytes
        return index

    def _check(self, index: ShardIndex, where: str) -> None:
        """Raise UserError for an index that this kind of shards cannot have."""

    def _map(self, shard: int) -> mmap.mmap:
        """Memory map of a shard, opened on first use."""
        opened = self._maps.get(shard)
        return self._open_map(shard) if opened is None else opened

    def _open_map(self, shard: int) -> mmap.mmap:
        info = self.manifest.shards[shard]
        where = self.store.where(info.name)
        try:
            with self.store.open(info.name, info.bytes, info.sha256) as file:
                opened = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the shard {where} ({error}); restore it or write it again") from error
        if len(opened) != info.bytes:
            raise UserError(
                f"shard file {where} has {len(opened):,} bytes instead of {info.bytes:,}; "
                "restore it or write the shards again"
            )
        with self._lock:
            # Not closed: views of it may be in use, and the last one closes it.
            while len(self._maps) >= _MAPS:
                del self._maps[next(iter(self._maps))]
            return self._maps.setdefault(shard, opened)

    def _json(self, shard: int, row: int) -> dict[str, Any]:
        offset, size = self._index(shard).json[row]
        try:
            return json.loads(self._map(shard)[offset : offset + size])
        except ValueError as error:
            where = self.store.where(self.manifest.shards[shard].name)
            raise UserError(f"document {row} of {where} is damaged ({error}); write the shards again") from error

    def id(self, i: int) -> str:
        """Id of document i."""
        shard, row = self._locate(i)
        return self._index(shard).ids[row].decode()

    def content(self, i: int) -> dict[str, Any]:
        """KEY.json of document i, without its pictures or tokens."""
        return self._json(*self._locate(i))

    def meta(self, i: int) -> dict[str, Any]:
        """The document's meta."""
        return self.content(i)["meta"]

    def place(self, i: int) -> tuple[str, int, int]:
        """Where document i lies: its tar, and offset and size in bytes of all its members with their headers."""
        shard, row = self._locate(i)
        index = self._index(shard)
        parts = index.parts[index.part_start[row] : index.part_start[row + 1]]
        start = int(index.json[row][0]) - BLOCK_BYTES
        end = max([int(index.json[row].sum()), *parts.sum(axis=1).tolist()])
        size = -(-(end - start) // BLOCK_BYTES) * BLOCK_BYTES  # members are padded to whole blocks
        return self.store.where(self.manifest.shards[shard].name), start, size

    @property
    def part_bytes(self) -> np.ndarray:
        """Size of every picture (of every document's token ids) in bytes, in writing order: (m,) int64."""
        return np.concatenate([self._index(shard).parts[:, 1] for shard in range(len(self.manifest.shards))])

    @property
    def ids(self) -> np.ndarray:
        """Ids of all documents: (n,) fixed-width bytes, ASCII."""
        return np.concatenate([self._index(shard).ids for shard in range(len(self.manifest.shards))])

    def index_of(self, id: str) -> int:
        """Index of the document with this id. Reads every index the first time. Raises KeyError if there is none."""
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


_OPEN = ("_indices", "_index_bytes", "_maps", "_lock", "_sorted_ids")


class DocumentShards(_Shards):
    """Documents by index: a sequence of `Document`.

    Raises UserError at opening if the folder is incomplete or of another kind, and at first use of a damaged shard.
    """

    def __init__(self, location: str | Path, store: Store | None = None) -> None:
        super().__init__(location, DOCUMENTS, store)

    def __getitem__(self, i: int) -> Document:
        shard, row = self._locate(i)
        content = self._json(shard, row)
        index = self._index(shard)
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

    Raises UserError at opening if the folder is incomplete, of another kind, or its vocabulary was exchanged,
    and at first use of a damaged shard.
    """

    def __init__(self, location: str | Path, store: Store | None = None) -> None:
        super().__init__(location, TOKENS, store)
        self.vocabulary = Vocabulary.load(self.store.fetch(VOCABULARY))
        if self.vocabulary.fingerprint != self.manifest.fingerprints.get("vocabulary"):
            where = self.store.where(VOCABULARY)
            raise UserError(f"{where} is not the vocabulary of these shards; write the shards again")
        self._dtype = self.vocabulary.dtype
        if self._dtype.name != self.manifest.dtype:
            raise UserError(f"the manifest in {self.store.location} is damaged; write the shards again")

    def _check(self, index: ShardIndex, where: str) -> None:
        kinds = index.segments[:, 0]
        if len(index.parts) != len(index) or ((kinds < 0) | (kinds >= len(MODALITIES))).any():
            raise UserError(f"the shard index {where} is damaged (it is not of tokens); write the shards again")

    def lengths(self) -> Iterator[np.ndarray]:
        """Tokens of each document: (n,) int64 for one shard after another."""
        for shard in range(len(self.manifest.shards)):
            yield self._index(shard).parts[:, 1] // self._dtype.itemsize

    def tokens(self, i: int) -> np.ndarray:
        """Ids of document i: (length,) of the vocabulary's dtype, a read-only view of the memory-mapped shard."""
        shard, row = self._locate(i)
        offset, size = self._index(shard).parts[row]
        return np.frombuffer(self._map(shard), self._dtype, int(size) // self._dtype.itemsize, int(offset))

    def segments(self, i: int) -> tuple[TokenSegment, ...]:
        """Text and image segments of document i."""
        shard, row = self._locate(i)
        index = self._index(shard)
        rows = index.segments[index.segment_start[row] : index.segment_start[row + 1]].tolist()
        return tuple(TokenSegment(MODALITIES[kind], start, length) for kind, start, length in rows)

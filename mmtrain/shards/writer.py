"""Write shards: reproducible tars, an index at each shard's close, the manifest last."""

import errno
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mmtrain.config import UserError
from mmtrain.documents import Document
from mmtrain.shards.index import build_index, save_index
from mmtrain.shards.manifest import (
    DOCUMENTS,
    MANIFEST,
    TOKENS,
    VOCABULARY,
    Manifest,
    ShardInfo,
    index_name,
    shard_name,
)
from mmtrain.tokens import MODALITIES, TokenDocument, Vocabulary

DOCUMENT_SHARD_BYTES = 256 << 20
TOKEN_SHARD_DOCUMENTS = 16_384

# A webdataset key ends at the first dot; 80 characters leave room for ".json" in a 100-byte USTAR name.
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_HEADER_BYTES = 512
_LEFTOVER = re.compile(r"\.?shard-\d{6}\.(tar|index\.npz)(\.partial)?")


def write_documents(folder: Path, documents: Iterable[Document], shard_bytes: int = DOCUMENT_SHARD_BYTES) -> Manifest:
    """Write document shards: KEY.json and KEY.0.png, KEY.1.jpg, ... per document.

    KEY.json: {"id", "source", "texts", "images", "meta", "image_info"}; texts and images have one entry per segment,
    one of the two null; an image entry is the member's name after the first dot; image_info (width, height,
    sha256) is aligned with images. A shard is closed once it holds `shard_bytes` of content.
    Raises UserError for a bad or repeated id, a folder that already holds shards, a full disk.
    """
    with _ShardWriter(Path(folder), DOCUMENTS) as writer:
        for document in documents:
            names: list[str | None] = []
            info: list[dict[str, Any] | None] = []
            images: list[tuple[str, bytes]] = []
            for segment in document.segments:
                if isinstance(segment, str):
                    names.append(None)
                    info.append(None)
                    continue
                name = f"{len(images)}.{segment.extension}"
                names.append(name)
                info.append({"width": segment.width, "height": segment.height, "sha256": segment.sha256})
                images.append((name, segment.data))
            content = {
                "id": document.id,
                "source": document.source,
                "texts": [segment if isinstance(segment, str) else None for segment in document.segments],
                "images": names,
                "image_info": info,
                "meta": document.meta,
            }
            writer.add(document.id, content, images)
            if writer.content_bytes >= shard_bytes:
                writer.close_shard()
        return writer.finish("", {})


def write_tokens(
    folder: Path,
    documents: Iterable[TokenDocument],
    vocabulary: Vocabulary,
    text_fingerprint: str,
    image_fingerprint: str,
    shard_documents: int = TOKEN_SHARD_DOCUMENTS,
) -> Manifest:
    """Write token shards: KEY.json {"id", "segments": [[kind, start, length], ...], "meta"} and KEY.npy (1-D ids).

    vocabulary.json is written beside them. Raises UserError as `write_documents` does, and for tokens of another
    type than the vocabulary's or with ids outside it.
    """
    folder = Path(folder)
    with _ShardWriter(folder, TOKENS) as writer:
        vocabulary.save(folder / VOCABULARY)
        for document in documents:
            tokens = document.tokens
            if tokens.ndim != 1 or tokens.dtype != vocabulary.dtype:
                raise UserError(
                    f"document {document.id} has tokens of type {tokens.dtype} and shape {tokens.shape}; "
                    f"{vocabulary.dtype} and one dimension are needed"
                )
            if tokens.size and int(tokens.max()) >= vocabulary.sentinel_end:
                raise UserError(
                    f"document {document.id} has id {tokens.max()} outside the vocabulary; build the tokens again"
                )
            segments = [(segment.kind, segment.start, segment.length) for segment in document.segments]
            content = {"id": document.id, "segments": segments, "meta": document.meta}
            payload = io.BytesIO()
            np.save(payload, np.ascontiguousarray(tokens), allow_pickle=False)
            counts = np.bincount(vocabulary.modality(tokens), minlength=len(MODALITIES))
            writer.add(
                document.id,
                content,
                [("npy", payload.getvalue())],
                skip=len(payload.getvalue()) - tokens.nbytes,
                segments=[(MODALITIES.index(kind), start, length) for kind, start, length in segments],
                counts=counts,
            )
            if writer.documents >= shard_documents:
                writer.close_shard()
        fingerprints = {"vocabulary": vocabulary.fingerprint, "text": text_fingerprint, "image": image_fingerprint}
        return writer.finish(vocabulary.dtype.name, fingerprints)


class _ShardWriter:
    """A folder being written; on any error everything it wrote is removed, so nothing unfinished is ever read."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.kind = kind
        self.shards: list[ShardInfo] = []
        self.written: list[Path] = []
        self.keys: set[str] = set()
        self.tar: tarfile.TarFile | None = None

    def __enter__(self) -> "_ShardWriter":
        if (self.folder / MANIFEST).exists():
            raise UserError(f"{self.folder} already holds shards; give an empty folder or delete it first")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self.folder} ({error.strerror}); give another one") from error
        # Without a manifest, shards are what an interrupted writer left.
        for path in self.folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                path.unlink()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        if self.tar is not None:
            with suppress(OSError, ValueError):
                self.file.close()
        for path in [*self.written, self.folder / VOCABULARY]:
            with suppress(OSError):
                path.unlink()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = self.content_bytes if self.tar is not None else 0
            done = sum(shard.bytes for shard in self.shards)
            raise UserError(
                f"the disk is full: {self.folder} needs more than the {done + needed:,} bytes it had got "
                "(removed again); free space or give a folder on another disk"
            ) from error

    def _open_shard(self) -> tarfile.TarFile:
        """Start the next shard under a temporary name."""
        self.name = shard_name(len(self.shards))
        self.partial = self.folder / f".{self.name}.partial"
        self.written.append(self.partial)
        self.file = open(self.partial, "wb")  # noqa: SIM115 - closed in close_shard or __exit__
        self.content_bytes = 0
        self.documents = 0
        self.counts = np.zeros(len(MODALITIES), np.int64)
        self.rows: tuple[list, list, list, list] = ([], [], [], [])
        return tarfile.open(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)

    def add(
        self,
        key: str,
        content: dict[str, Any],
        parts: list[tuple[str, bytes]],
        skip: int = 0,
        segments: list[tuple[int, int, int]] | None = None,
        counts: np.ndarray | None = None,
    ) -> None:
        """Append KEY.json and the parts; the index leaves out the first `skip` bytes of each part."""
        if not KEY.fullmatch(key):
            raise UserError(f"document id {key!r} cannot be a shard key; use 1 to 80 of the characters A-Z a-z 0-9 _ -")
        if key in self.keys:
            raise UserError(f"document id {key} occurs twice; ids must be unique in a corpus")
        self.keys.add(key)
        self.tar = self.tar or self._open_shard()
        text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        ids, json_spans, part_spans, segment_rows = self.rows
        json_spans.append(self._member(f"{key}.json", text.encode()))
        spans = [self._member(f"{key}.{name}", data) for name, data in parts]
        part_spans.append([(offset + skip, size - skip) for offset, size in spans])
        segment_rows.append(segments or [])
        ids.append(key)
        if counts is not None:
            self.counts += counts
        self.documents += 1

    def _member(self, name: str, data: bytes) -> tuple[int, int]:
        """Append one file with nothing in its header that could differ between two runs; return offset and size."""
        assert self.tar is not None
        member = tarfile.TarInfo(name)
        member.size = len(data)
        member.mode = 0o644
        offset = self.tar.offset + _HEADER_BYTES
        self.content_bytes += len(data)
        self.tar.addfile(member, io.BytesIO(data))
        return offset, len(data)

    def close_shard(self) -> None:
        """Finish the open shard: tar and index get their final names, both safely on disk."""
        if self.tar is None:
            return
        self.tar.close()
        self.file.close()
        partial_index = self.folder / f".{index_name(self.name)}.partial"
        self.written.append(partial_index)
        save_index(partial_index, build_index(*self.rows))
        hashes = []
        for partial, name in ((self.partial, self.name), (partial_index, index_name(self.name))):
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
                hashes.append((os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()))
            os.replace(partial, self.folder / name)
            self.written.append(self.folder / name)
        _, text_tokens, image_tokens = (int(count) for count in self.counts)
        self.shards.append(ShardInfo(self.name, *hashes[0], *hashes[1], self.documents, text_tokens, image_tokens))
        self.tar = None

    def finish(self, dtype: str, fingerprints: dict[str, str]) -> Manifest:
        """Close the last shard and write the manifest. Raises UserError if there was no document."""
        self.close_shard()
        if not self.shards:
            raise UserError(f"there is no document to write into {self.folder}; check the corpus")
        manifest = Manifest(
            self.kind, dtype, sum(shard.documents for shard in self.shards), tuple(self.shards), fingerprints
        )
        _sync_folder(self.folder)
        manifest.save(self.folder)
        _sync_folder(self.folder)
        return manifest


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Write shards: reproducible tars, an index at each shard's close, the manifest last.

A shard is a unit of work, written by any process; the manifest of the folder joins them.
"""

import errno
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mmtrain.config import UserError, sync_folder
from mmtrain.documents import Document
from mmtrain.shards.index import build_index, load_index, save_index
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

T = TypeVar("T")


def write_documents(folder: Path, documents: Iterable[Document], shard_bytes: int = DOCUMENT_SHARD_BYTES) -> Manifest:
    """Write document shards and their manifest; a shard is closed once it holds `shard_bytes` of content.

    Raises UserError for a bad or repeated id, no document at all, a folder that already holds shards, a full disk.
    """

    def shard_of(documents: Iterator[Document]) -> Iterator[Document]:
        size = 0
        while size < shard_bytes and (document := next(documents, None)) is not None:
            yield document
            size += content_bytes(document)

    return _write_folder(
        Path(folder),
        documents,
        lambda number, documents: write_document_shard(folder, number, shard_of(documents)),
        lambda shards: finish_documents(folder, shards),
    )


def write_tokens(
    folder: Path,
    documents: Iterable[TokenDocument],
    vocabulary: Vocabulary,
    text_fingerprint: str,
    image_fingerprint: str,
    shard_documents: int = TOKEN_SHARD_DOCUMENTS,
) -> Manifest:
    """Write token shards of `shard_documents` documents, vocabulary.json beside them, and their manifest.

    Raises UserError as `write_documents` and `write_token_shard` do.
    """
    return _write_folder(
        Path(folder),
        documents,
        lambda number, documents: write_token_shard(folder, number, islice(documents, shard_documents), vocabulary),
        lambda shards: finish_tokens(folder, shards, vocabulary, text_fingerprint, image_fingerprint),
    )


def write_document_shard(folder: Path, number: int, documents: Iterable[Document]) -> ShardInfo:
    """Write one shard: KEY.json and KEY.0.png, KEY.1.jpg, ... per document.

    KEY.json: {"id", "source", "texts", "images", "meta", "image_info"}; texts and images have one entry per segment,
    one of the two null; an image entry is the member's name after the first dot; image_info (width, height,
    sha256) is aligned with images. The shard is whole or absent, also after a crash.
    Raises UserError for a bad id, one that repeats in the shard, a full disk.
    """
    with _open_shard(Path(folder), number) as shard:
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
            shard.add(document.id, content, images)
        return shard.close()


def write_token_shard(
    folder: Path, number: int, documents: Iterable[TokenDocument], vocabulary: Vocabulary
) -> ShardInfo:
    """Write one shard: KEY.json {"id", "segments": [[kind, start, length], ...], "meta"} and KEY.npy (1-D ids).

    Raises UserError as `write_document_shard` does, and for tokens of another type than the vocabulary's or with
    ids outside it.
    """
    with _open_shard(Path(folder), number) as shard:
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
            payload = io.BytesIO()
            np.save(payload, np.ascontiguousarray(tokens), allow_pickle=False)
            shard.add(
                document.id,
                {"id": document.id, "segments": segments, "meta": document.meta},
                [("npy", payload.getvalue())],
                skip=len(payload.getvalue()) - tokens.nbytes,
                segments=[(MODALITIES.index(kind), start, length) for kind, start, length in segments],
                counts=np.bincount(vocabulary.modality(tokens), minlength=len(MODALITIES)),
            )
        return shard.close()


def finish_documents(folder: Path, shards: Sequence[ShardInfo]) -> Manifest:
    """Write the manifest of document shards 0..n-1. Raises UserError for a repeated id or no document."""
    return _finish(Path(folder), DOCUMENTS, shards, "", {})


def finish_tokens(
    folder: Path,
    shards: Sequence[ShardInfo],
    vocabulary: Vocabulary,
    text_fingerprint: str,
    image_fingerprint: str,
    made_of: Mapping[str, str] | None = None,
) -> Manifest:
    """Write vocabulary.json and the manifest of token shards 0..n-1; raises UserError as `finish_documents` does.

    made_of: more fingerprints for the manifest, such as that of the documents.
    """
    vocabulary.save(Path(folder) / VOCABULARY)
    fingerprints = {"vocabulary": vocabulary.fingerprint, "text": text_fingerprint, "image": image_fingerprint}
    fingerprints |= made_of or {}
    return _finish(Path(folder), TOKENS, shards, vocabulary.dtype.name, fingerprints)


def content_bytes(document: Document) -> int:
    """Bytes of the texts and pictures of a document, by which document shards are cut."""
    return sum(len(text.encode()) for text in document.texts) + sum(len(image.data) for image in document.images)


def _write_folder(
    folder: Path,
    documents: Iterable[T],
    write_shard: Callable[[int, Iterator[T]], ShardInfo],
    finish: Callable[[list[ShardInfo]], Manifest],
) -> Manifest:
    """A folder in one go; on any error every shard of it is removed."""
    if (folder / MANIFEST).exists():
        raise UserError(f"{folder} already holds shards; give an empty folder or delete it first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror}); give another one") from error
    _remove_shards(folder)  # without a manifest, they are what an interrupted writer left
    shards: list[ShardInfo] = []
    remaining = iter(documents)
    try:
        while (first := next(remaining, None)) is not None:
            shards.append(write_shard(len(shards), chain([first], remaining)))
        return finish(shards)
    except BaseException:
        _remove_shards(folder)
        (folder / VOCABULARY).unlink(missing_ok=True)
        raise


def _remove_shards(folder: Path) -> None:
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            path.unlink()


def _finish(
    folder: Path, kind: str, shards: Sequence[ShardInfo], dtype: str, fingerprints: dict[str, str]
) -> Manifest:
    documents = sum(shard.documents for shard in shards)
    if not documents:
        raise UserError(f"there is no document to write into {folder}; check the corpus")
    indices = (load_index(folder / index_name(shard.name), shard.bytes, shard.documents) for shard in shards)
    ids = np.sort(np.concatenate([index.ids for index in indices]))
    repeated = ids[1:][ids[1:] == ids[:-1]]
    if len(repeated):
        raise UserError(_repeats(repeated[0].decode()))
    manifest = Manifest(kind, dtype, documents, tuple(shards), fingerprints)
    sync_folder(folder)
    manifest.save(folder)
    sync_folder(folder)
    return manifest


def _repeats(key: str) -> str:
    return f"document id {key} occurs twice; ids must be unique in a corpus"


@contextmanager
def _open_shard(folder: Path, number: int) -> Iterator["_Shard"]:
    """A shard being written; on any error what was written of it is removed."""
    shard = _Shard(folder, shard_name(number))
    try:
        shard.open()
        yield shard
    except BaseException as error:
        shard.remove()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full: {folder / shard.name} needs more than the {shard.content_bytes:,} bytes it had got "
                "(removed again); free space or give a folder on another disk"
            ) from error
        raise


class _Shard:
    """One tar and its index, under temporary names until `close`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.partials = {file: folder / f".{file}.partial" for file in (name, index_name(name))}
        self.content_bytes = 0
        self.counts = np.zeros(len(MODALITIES), np.int64)
        self.rows: dict[str, Any] = {}  # key -> spans of the JSON and the parts, segments

    def open(self) -> None:
        """Start the tar."""
        self.file = open(self.partials[self.name], "wb")  # noqa: SIM115 - closed in close or remove
        self.tar = tarfile.open(  # noqa: SIM115
            fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT
        )

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
        if key in self.rows:
            raise UserError(_repeats(key))
        text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        json_span = self._member(f"{key}.json", text.encode())
        spans = [self._member(f"{key}.{name}", data) for name, data in parts]
        self.rows[key] = json_span, [(offset + skip, size - skip) for offset, size in spans], segments or []
        if counts is not None:
            self.counts += counts

    def _member(self, name: str, data: bytes) -> tuple[int, int]:
        """Append one file with nothing in its header that could differ between two runs; return offset and size."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        member.mode = 0o644
        offset = self.tar.offset + _HEADER_BYTES
        self.content_bytes += len(data)
        self.tar.addfile(member, io.BytesIO(data))
        return offset, len(data)

    def close(self) -> ShardInfo:
        """Give tar and index their final names, both safely on disk; the index first, the tar stands for both."""
        self.tar.close()
        self.file.close()
        rows = self.rows.values()
        columns = ([row[column] for row in rows] for column in range(3))
        index = build_index(list(self.rows), *columns)
        save_index(self.partials[index_name(self.name)], index)
        facts: dict[str, tuple[int, str]] = {}
        for name, partial in self.partials.items():
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
                facts[name] = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
        for name, partial in reversed(self.partials.items()):
            os.replace(partial, self.folder / name)
        sync_folder(self.folder)
        _, text_tokens, image_tokens = (int(count) for count in self.counts)
        of_index = facts[index_name(self.name)]
        return ShardInfo(self.name, *facts[self.name], *of_index, len(self.rows), text_tokens, image_tokens)

    def remove(self) -> None:
        """Leave nothing of the shard behind."""
        with suppress(OSError, ValueError, AttributeError):
            self.file.close()
        for name, partial in self.partials.items():
            for path in (partial, self.folder / name):
                with suppress(OSError):
                    path.unlink()

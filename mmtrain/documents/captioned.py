"""From files with captions to documents: what the readers of real pictures share."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.config import CorpusConfig, UserError
from mmtrain.documents.document import Document, Image
from mmtrain.documents.held_out import held_out_pictures
from mmtrain.documents.images import BadImage
from mmtrain.documents.reading import Reading, printable

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# A longer text beside a picture is no caption.
LARGEST_CAPTION_BYTES = 100_000
# No honest picture needs more: 16 bits in 4 channels, uncompressed, and a megabyte of metadata.
LARGEST_BYTES_PER_PIXEL = 8
LARGEST_METADATA_BYTES = 2**20

# Encoded bytes and name -> the picture to store and what to say about it in meta. Raises BadImage.
Prepare = Callable[[bytes, str], tuple[Image, dict[str, Any]]]


@dataclass(frozen=True)
class Caption:
    """One caption of a picture; `document_id` is that of the document it makes."""

    text: str
    document_id: str
    meta: dict[str, Any]


@dataclass(frozen=True)
class CaptionedPicture:
    """A picture file and its captions, one document each. name: its path relative to the corpus, with slashes."""

    name: str
    path: Path
    captions: tuple[Caption, ...]


def id_of_path(name: str) -> str:
    """16 hexadecimal digits that depend on the relative path alone."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def largest_picture_bytes(max_pixels: int) -> int:
    """Bytes of the largest file that is opened as a picture."""
    return LARGEST_BYTES_PER_PIXEL * max_pixels + LARGEST_METADATA_BYTES


def _read_bytes(path: Path, max_pixels: int) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe would be read forever
            raise BadImage("unreadable file", "not a regular file")
        num_bytes = path.stat().st_size
        if num_bytes > largest_picture_bytes(max_pixels):
            raise BadImage("too many pixels", f"a file of {num_bytes} bytes")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadImage("missing file", str(path)) from error
    except OSError as error:
        raise BadImage("unreadable file", error.strerror or str(error)) from error


def captioned_documents(
    reading: Reading,
    pictures: Sequence[CaptionedPicture],
    source: str,
    config: CorpusConfig,
    split: str,
    prepare: Prepare,
    num_bad_entries: int = 0,
) -> Iterator[Document]:
    """The documents (caption, then picture) of one split, in the order of the hashes of their paths.

    Every bad picture is skipped and counted, in the pass of the side that its hash puts it on. The train pass
    judges the whole: UserError when more than config.max_bad_fraction of its pictures is bad (with
    `num_bad_entries`, bad before they were opened), or none is good.
    """
    hash_of: dict[str, str] = {}
    path_of_hash: dict[str, tuple[Path, str]] = {}
    unreadable: list[tuple[str, str]] = []
    # In the order of hashes, so that max_documents takes a sample and not the first folder.
    pictures = sorted(pictures, key=lambda picture: id_of_path(picture.name))
    for picture in pictures:
        try:
            sha256 = hashlib.sha256(_read_bytes(picture.path, config.max_pixels)).hexdigest()
        except BadImage as error:
            unreadable.append((error.reason, picture.name))
            continue
        hash_of[picture.name] = sha256
        path_of_hash.setdefault(sha256, (picture.path, picture.name))

    def is_good(sha256: str) -> bool:
        path, name = path_of_hash[sha256]
        try:
            prepare(_read_bytes(path, config.max_pixels), name)
        except BadImage:
            return False
        return True

    held_out = held_out_pictures(path_of_hash, config.validation_fraction, is_good)
    if split == "train":
        for reason, name in unreadable:
            reading.skip(reason, name)
    num_bad = num_bad_entries + len(unreadable)
    num_seen, num_documents = num_bad, 0
    for picture in pictures:
        if picture.name not in hash_of or (hash_of[picture.name] in held_out) != (split == "validation"):
            continue
        num_seen += 1
        try:
            image, meta = prepare(_read_bytes(picture.path, config.max_pixels), picture.name)
        except BadImage as error:
            reading.skip(error.reason, picture.name)
            num_bad += 1
            continue
        for caption in picture.captions:
            if config.max_documents and num_documents == config.max_documents:
                return
            num_documents += 1
            facts = {"path": printable(picture.name), **caption.meta, **meta}
            yield Document(caption.document_id, source, (caption.text, image), facts)
    if split == "train":
        judge(reading, num_bad, num_seen, num_documents, source, config)


def judge(reading: Reading, num_bad: int, num_seen: int, num_good: int, source: str, config: CorpusConfig) -> None:
    """Raise UserError when nothing is good, or more than config.max_bad_fraction of what was seen is bad."""
    where = f"corpus {source} ({config.path})" if config.path else f"corpus {source}"
    if num_good == 0:
        raise UserError(f"{where} has no usable captioned picture: {reading.summary() or 'nothing was found'}.")
    if num_bad > config.max_bad_fraction * num_seen:
        raise UserError(
            f"{where}: {num_bad} of {num_seen} pictures cannot be used, more than "
            f"corpus.max_bad_fraction={config.max_bad_fraction} allows: {reading.summary()}; mend or remove "
            "them, or raise that limit."
        )


def relative_name(path: Path, root: Path) -> str:
    """`path` below `root` with slashes on every system."""
    return Path(os.path.relpath(path, root)).as_posix()


def is_inside(path: Path, root: Path) -> bool:
    """Whether `path`, links followed, is below `root` (resolved): a folder from a stranger may link anywhere."""
    try:
        return path.resolve().is_relative_to(root)
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL in the name
        return False

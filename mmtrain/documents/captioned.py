"""From files with captions to documents: what the readers of captioned pictures share."""

import hashlib
import os
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.config import CorpusConfig
from mmtrain.documents.corpus import Account, Partition, printable
from mmtrain.documents.document import Document, Image
from mmtrain.documents.images import BadImage

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PICTURES_PER_PARTITION = 500
# A longer text beside a picture is no caption.
LARGEST_CAPTION_BYTES = 100_000
# No honest picture needs more: 16 bits in 4 channels, uncompressed, and a megabyte of metadata.
LARGEST_BYTES_PER_PIXEL = 8
LARGEST_METADATA_BYTES = 2**20

# Encoded bytes and name -> the picture to store and what to say about it in meta. Raises BadImage.
Prepare = Callable[[bytes, str], tuple[Image, dict[str, Any]]]


class BadSample(Exception):
    """A captioned picture that cannot be used. `reason` is one of a few fixed phrases to count by."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


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
    captions: tuple[Caption, ...]


def captioned_documents(
    pictures: Iterable[CaptionedPicture],
    root: Path,
    prepare: Prepare,
    config: CorpusConfig,
    account: Account,
) -> Iterator[Document]:
    """The documents (caption, then picture) of pictures below `root`; a bad one is counted once per caption."""
    for picture in pictures:
        try:
            largest = largest_picture_bytes(config.max_pixels)
            image, meta = prepare(read_file(root, picture.name, largest, "too many pixels"), picture.name)
        except (BadSample, BadImage) as error:
            account.spoil(error.reason, picture.name, len(picture.captions))
            continue
        for caption in picture.captions:
            facts = {"path": printable(picture.name), **caption.meta, **meta}
            yield Document(caption.document_id, config.name, (caption.text, image), facts)


def picture_partitions(captions_of: dict[str, Any]) -> list[Partition]:
    """Partitions {"pictures": [[stored name, captions], ...]} of pictures by name.

    In the order of the hashes of their paths, so that any prefix is a sample and not the first folder.
    """
    names = sorted(captions_of, key=id_of_path)
    return [
        {"pictures": [[stored_name(name), captions_of[name]] for name in names[start : start + PICTURES_PER_PARTITION]]}
        for start in range(0, len(names), PICTURES_PER_PARTITION)
    ]


def files_below(root: Path, suffixes: tuple[str, ...], account: Account) -> Iterator[str]:
    """Names, relative and with slashes, of the files below `root` that end in one of `suffixes`, in any case.

    Sorted in each folder. What is hidden and folders that are links are left out.
    """

    def spoil(error: OSError) -> None:
        account.spoil("unreadable folder", relative_name(Path(error.filename), root))

    for parent, folders, filenames in os.walk(root, onerror=spoil):
        relative = Path(os.path.relpath(parent, root))
        folders.sort()
        for folder in folders:
            if folder.startswith("."):
                account.skip("hidden folder", (relative / folder).as_posix())
            elif Path(parent, folder).is_symlink():
                account.skip("link to a folder", (relative / folder).as_posix())
        folders[:] = [folder for folder in folders if not folder.startswith(".")]  # os.walk follows no links
        for filename in sorted(filenames):
            if filename.lower().endswith(suffixes):
                name = (relative / filename).as_posix()
                if filename.startswith("."):
                    account.skip("hidden file", name)
                else:
                    yield name


def id_of_path(name: str) -> str:
    """16 hexadecimal digits that depend on the relative path alone."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def stored_name(name: str) -> str:
    """A file name as plain text for a partition: Linux allows names that UTF-8 and JSON cannot hold."""
    return urllib.parse.quote(name, errors="surrogateescape")


def named_again(stored: str) -> str:
    """The file name that `stored_name` was given."""
    return urllib.parse.unquote(stored, errors="surrogateescape")


def largest_picture_bytes(max_pixels: int) -> int:
    """Bytes of the largest file that is opened as a picture."""
    return LARGEST_BYTES_PER_PIXEL * max_pixels + LARGEST_METADATA_BYTES


def read_file(root: Path, name: str, largest_bytes: int, too_large: str) -> bytes:
    """The content of a regular file inside `root`. Raises BadSample, `too_large` for more than largest_bytes."""
    path = root / name
    if not is_inside(path, root.resolve()):
        raise BadSample("path leaves the folder")
    try:
        if path.exists() and not path.is_file():  # a pipe would be read forever
            raise BadSample("unreadable file")
        if path.stat().st_size > largest_bytes:
            raise BadSample(too_large)
        return path.read_bytes()
    except FileNotFoundError:
        raise BadSample("missing file") from None
    except OSError:
        raise BadSample("unreadable file") from None


def decode_caption(data: bytes) -> str:
    """A caption in UTF-8 on one line. Raises BadSample."""
    try:
        caption = " ".join(data.decode("utf-8-sig").split())
    except UnicodeDecodeError:
        raise BadSample("caption is not UTF-8") from None
    if not caption:
        raise BadSample("empty caption")
    return caption


def relative_name(path: Path, root: Path) -> str:
    """`path` below `root` with slashes on every system."""
    return Path(os.path.relpath(path, root)).as_posix()


def is_inside(path: Path, root: Path) -> bool:
    """Whether `path`, links followed, is below `root` (resolved): a folder from a stranger may link anywhere."""
    try:
        return path.resolve().is_relative_to(root)
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL in the name
        return False

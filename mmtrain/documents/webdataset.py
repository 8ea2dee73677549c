"""Interleaved documents in webdataset tars: KEY.json with its pictures KEY.0.jpg, KEY.1.webp, ... around it.

KEY.json is {"texts": [...], "images": [...]}, two aligned lists (the shape of OBELICS, Megatron-Energon and of the
document shards that mmtrain writes): at each position one of them is null, and an image is named by what follows
the first dot of its member's name. Without a KEY.json, KEY.txt and KEY.jpg are a document, alone or together. The
members of a document lie side by side, in any order.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from mmtrain.documents.captioned import PICTURE_SUFFIXES, id_of_path, largest_picture_bytes
from mmtrain.documents.corpus import Account, Corpus, Partition, printable
from mmtrain.documents.document import Document
from mmtrain.documents.files import UNREADABLE, file_path, list_files
from mmtrain.documents.interleaved import TOO_LARGE, Picture, interleaved_document
from mmtrain.documents.record import LARGEST_TEXT_BYTES, BadRecord, aligned, parse_object, plain
from mmtrain.documents.tars import DamagedTar, Member, read_members

HOW = "set corpus.path to a folder of webdataset tars, or to one of them"
TEXTS = ("json", "txt")
DAMAGED = "damaged tar"
CUT = "document cut off by a damaged tar"


@dataclass(frozen=True)
class _Group:
    """Neighbouring members of one key. parts: what follows the first dot -> where in the tar, how many bytes.

    is_whole: whether no more members of it can be missing because the tar is damaged there.
    """

    key: str
    parts: dict[str, tuple[int, int]]
    is_whole: bool


def keyed_members(file: BinaryIO, name: str, account: Account) -> Iterator[tuple[str, str, Member]]:
    """(key, suffix, member) of a tar's files; the key ends at the first dot, the suffix is in lower case.

    `name` is the tar's. What has no key is counted. Raises DamagedTar.
    """
    for member in read_members(file):
        if member.is_folder:
            continue
        path = PurePosixPath(member.name)
        stem, _, suffix = path.name.partition(".")
        if not member.is_file:
            account.spoil("not a regular file", f"{name}/{member.name}")
        elif path.is_absolute() or ".." in path.parts:
            account.spoil("path leaves the tar", f"{name}/{member.name}")
        elif not stem or not suffix:
            account.skip("name without a key", f"{name}/{member.name}")
        else:
            yield str(path.with_name(stem)), suffix.lower(), member


def _groups(file: BinaryIO, name: str, account: Account) -> Iterator[_Group]:
    """The members of a tar by key as they lie there."""
    key = ""
    parts: dict[str, tuple[int, int]] = {}
    is_whole = True
    try:
        for next_key, suffix, member in keyed_members(file, name, account):
            if parts and (next_key != key or suffix in parts):
                yield _Group(key, parts, True)
                parts = {}
            key = next_key
            parts[suffix] = (file.tell(), member.num_bytes)
    except (DamagedTar, OSError) as error:
        account.spoil(DAMAGED, f"{name}, {error}")
        is_whole = False
    if parts:
        yield _Group(key, parts, is_whole)


def _is_picture(suffix: str) -> bool:
    return f".{suffix}".endswith(PICTURE_SUFFIXES)


class WebDataset(Corpus):
    """One document per key, in the order of the tars' names and then as they lie there.

    meta: that of KEY.json, where there is one, its url, and path (TAR/KEY). A key that comes again in its tar is
    damage. A damaged tar costs what follows the damage; a document whose json and pictures all lie before it
    is delivered. The one multi-frame KEY.tiff of MINT-1T is not supported and counted.
    """

    def partitions(self, account: Account) -> list[Partition]:
        return [{"file": name} for name in list_files(self.config, (".tar",), HOW, account)]

    def documents(self, partition: Partition, account: Account) -> Iterator[Document]:
        name = partition["file"]
        try:
            file = open(file_path(self.config, name), "rb")  # noqa: SIM115 - closed below
        except OSError as error:
            account.spoil(UNREADABLE, f"{name}, {error.strerror}")
            return
        seen: set[str] = set()
        with file:
            for group in _groups(file, name, account):
                label = f"{name}/{group.key}"
                try:
                    if group.key in seen:
                        raise BadRecord("duplicate key")
                    seen.add(group.key)
                    parts, meta = self._read_group(file, group, label, account)
                except BadRecord as error:
                    account.spoil(str(error), label)
                    continue
                document_id = f"webdataset-{id_of_path(label)}"
                document = interleaved_document(
                    document_id, self.config.name, parts, {"path": printable(label), **meta}, self.config, account
                )
                if document:
                    yield document

    def _read_group(
        self, file: BinaryIO, group: _Group, label: str, account: Account
    ) -> tuple[Iterator[str | Picture], dict[str, Any]]:
        """Texts and pictures in reading order, pictures not read yet, and the meta. Raises BadRecord."""
        if {"tiff", "tif"} & group.parts.keys():
            raise BadRecord("a multi-frame TIFF is not supported")
        if "json" in group.parts:
            content = parse_object(_read_text(file, group, "json"))
            positions = aligned(_list(content, "texts"), _list(content, "images"))
            if not all(image is None or isinstance(image, str) for _, image in positions):
                raise BadRecord("an image that is no name")
            meta = _meta(content)
        elif group.is_whole:
            positions = _without_json(file, group)
            meta = {}
        else:
            raise BadRecord(CUT)
        positions = [(text, image and image.lower()) for text, image in positions]
        named = {image for _, image in positions if image is not None}
        if not group.is_whole and not named <= group.parts.keys():
            raise BadRecord(CUT)
        for suffix in group.parts.keys() - named - {"json"}:
            if _is_picture(suffix):
                account.spoil("picture that no json names", f"{label}.{suffix}")
            elif suffix != "txt" or "json" in group.parts:
                account.skip("member that is not needed", f"{label}.{suffix}")
        return self._parts(file, group, label, positions), meta

    def _parts(
        self, file: BinaryIO, group: _Group, label: str, positions: list[tuple[str | None, str | None]]
    ) -> Iterator[str | Picture]:
        for text, image in positions:
            if image is None:
                yield text or ""
                continue
            offset, num_bytes = group.parts.get(image, (0, -1))
            if num_bytes < 0 or image in TEXTS:
                yield Picture(f"{label}.{image}", None)
            elif num_bytes > largest_picture_bytes(self.config.max_pixels):
                yield Picture(f"{label}.{image}", None, TOO_LARGE)
            else:
                yield Picture(f"{label}.{image}", os.pread(file.fileno(), num_bytes, offset))


def _read_text(file: BinaryIO, group: _Group, suffix: str) -> bytes:
    offset, num_bytes = group.parts[suffix]
    if num_bytes > LARGEST_TEXT_BYTES:
        raise BadRecord(f"{suffix} too large")
    return os.pread(file.fileno(), num_bytes, offset)


def _list(content: dict[str, Any], field: str) -> list[Any] | None:
    value = content.get(field)
    if value is not None and not isinstance(value, list):
        raise BadRecord(f"{field} is no list")
    return value


def _meta(content: dict[str, Any]) -> dict[str, Any]:
    meta = content.get("meta")
    meta = plain(meta) if isinstance(meta, dict) else {}
    if meta.get("split") not in ("train", "validation"):
        meta.pop("split", None)
    if isinstance(content.get("url"), str):
        meta["url"] = printable(content["url"])
    return meta


def _without_json(file: BinaryIO, group: _Group) -> list[tuple[str | None, str | None]]:
    """KEY.txt and then KEY.jpg. Raises BadRecord for numbered pictures: only a json says their order and number."""
    pictures = [suffix for suffix in group.parts if _is_picture(suffix)]
    if len(pictures) > 1 or any("." in suffix for suffix in pictures) or not (pictures or "txt" in group.parts):
        raise BadRecord("no json")
    if "txt" not in group.parts:
        return [(None, pictures[0])]
    try:
        text = _read_text(file, group, "txt").decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadRecord("text is not UTF-8") from None
    return [(text, None), *((None, picture) for picture in pictures)]

"""The tars that img2dataset writes (webdataset output): KEY.jpg, KEY.txt and KEY.json side by side in NNNNN.tar.

They are read from front to back, one sample in memory at a time, and never unpacked. The .parquet beside a tar
is not read; of NNNNN_stats.json only how many samples the tar should hold.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mmtrain.config import CorpusConfig, UserError
from mmtrain.documents.captioned import (
    LARGEST_CAPTION_BYTES,
    PICTURE_SUFFIXES,
    BadSample,
    decode_caption,
    files_below,
    id_of_path,
    is_inside,
    largest_picture_bytes,
    named_again,
    stored_name,
)
from mmtrain.documents.corpus import Account, Corpus, Partition, printable
from mmtrain.documents.document import Document
from mmtrain.documents.images import BadImage, image_from_bytes
from mmtrain.documents.tars import DamagedTar, Member, read_members

HOW = "set corpus.path to the folder of tars that img2dataset wrote, or to one of them"
LARGEST_JSON_BYTES = 2**20
LARGEST_STATS_BYTES = 2**24
KEPT_FACTS = {"url": str, "original_width": int, "original_height": int}
DAMAGED = "damaged tar"
UNREADABLE = "unreadable file"


class _FailedDownload(Exception):
    """A sample that img2dataset could not download: nothing is wrong with the tar."""


@dataclass(frozen=True)
class _Group:
    """Neighbouring members of one key. parts: "picture", "txt", "json" -> bytes, None where they are too many."""

    key: str
    parts: dict[str, bytes | None]
    is_whole: bool


@dataclass(frozen=True)
class _Sample:
    """A captioned picture, not decoded yet. name: TAR/KEY."""

    name: str
    caption: str
    data: bytes
    facts: dict[str, Any]


class Img2Dataset(Corpus):
    """One document per captioned picture, as they lie in the tar. A partition is a tar, in the order of the names.

    meta: path (TAR/KEY), and url, original_width, original_height where the json has them. Everything that is left
    out is bad, but for failed downloads.
    """

    def partitions(self, account: Account) -> list[Partition]:
        """One tar each. Raises UserError where there is none."""
        if not self.config.path:
            raise UserError(f"corpus {self.config.name} has no corpus.path; {HOW}.")
        path = Path(self.config.path)
        if not path.exists():
            raise UserError(f"corpus.path={path} does not exist; {HOW}.")
        if path.is_file() and path.suffix == ".tar":
            return [{"tar": stored_name(path.name)}]
        if not path.is_dir():
            raise UserError(f"corpus.path={path} is neither a folder nor a .tar; {HOW}.")
        names = sorted(files_below(path, (".tar",), account))
        if not names:
            raise UserError(f"corpus.path={path} holds no .tar; {HOW}.")
        return [{"tar": stored_name(name)} for name in names]

    def documents(self, partition: Partition, account: Account) -> Iterator[Document]:
        """Caption, then picture."""
        name = named_again(partition["tar"])
        path = Path(str(self.config.path))
        if path.is_dir():
            if not is_inside(path / name, path.resolve()):
                account.spoil("path leaves the folder", name)
                return
            path = path / name
        if not path.is_file():  # a pipe would be read forever
            account.spoil(UNREADABLE, name)
            return
        for sample in _samples(path, name, self.config, account):
            try:
                image = image_from_bytes(sample.data, self.config.max_pixels)
            except BadImage as error:
                account.spoil(error.reason, sample.name)
                continue
            meta = {"path": printable(sample.name), **sample.facts}
            yield Document(f"img2dataset-{id_of_path(sample.name)}", self.config.name, (sample.caption, image), meta)


def _split_name(name: str) -> tuple[str, str]:
    """Key and kind of a member, webdataset's way: the key ends at the first dot of the file name.

    The kind is "picture", "txt", "json", or "" for what is not needed. Raises BadSample.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise BadSample("path leaves the tar")
    stem, _, suffix = path.name.partition(".")
    if not stem or not suffix:
        raise BadSample("name without a key")
    suffix = f".{suffix.lower()}"
    kind = "picture" if suffix in PICTURE_SUFFIXES else suffix[1:] if suffix in (".txt", ".json") else ""
    return str(path.with_name(stem)), kind


def _read_part(member: Member, kind: str, config: CorpusConfig) -> bytes | None:
    largest = {
        "picture": largest_picture_bytes(config.max_pixels),
        "txt": LARGEST_CAPTION_BYTES,
        "json": LARGEST_JSON_BYTES,
    }[kind]
    return member.read() if member.num_bytes <= largest else None


def _groups(tar: Path, name: str, config: CorpusConfig, account: Account) -> Iterator[_Group]:
    """The samples of a tar as they lie there. The one in which a damaged tar ends is not whole."""
    key = ""
    parts: dict[str, bytes | None] = {}
    try:
        with open(tar, "rb") as file:
            for member in read_members(file):
                if member.is_folder:
                    continue
                try:
                    if not member.is_file:
                        raise BadSample("not a regular file")
                    next_key, kind = _split_name(member.name)
                except BadSample as error:
                    account.spoil(error.reason, f"{name}/{member.name}")
                    continue
                if key and (next_key != key or kind in parts):
                    yield _Group(key, parts, is_whole=True)
                    parts = {}
                key = next_key
                if kind:
                    parts[kind] = _read_part(member, kind, config)
    except (DamagedTar, OSError) as error:
        account.spoil(DAMAGED if isinstance(error, DamagedTar) else UNREADABLE, f"{name}, {error}")
        if key:
            yield _Group(key, {}, is_whole=False)
    else:
        if key:
            yield _Group(key, parts, is_whole=True)


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise BadSample("json is no JSON object")
    return content


def _find_caption(text: bytes | None, facts: dict[str, Any]) -> str:
    """One line from KEY.txt or, where there is none, from KEY.json. Raises BadSample."""
    if text is None:
        caption = facts.get("caption")
        if not isinstance(caption, str):
            raise BadSample("no caption")
        text = caption.encode("utf-8", "replace")  # a lone surrogate from a JSON escape cannot be stored as UTF-8
    if len(text) > LARGEST_CAPTION_BYTES:
        raise BadSample("caption too long")
    return decode_caption(text)


def _open_group(group: _Group, name: str) -> _Sample:
    """The sample of a group; the picture is not looked at. Raises BadSample, _FailedDownload."""
    if not group.is_whole:
        raise BadSample(DAMAGED)
    parts = {kind: data for kind, data in group.parts.items() if data is not None}
    if len(parts) < len(group.parts):
        raise BadSample("member too large")
    facts = _parse_json(parts["json"]) if "json" in parts else {}
    if "picture" not in parts:
        if facts.get("status") in (None, "success"):
            raise BadSample("no picture")
        raise _FailedDownload
    caption = _find_caption(parts.get("txt"), facts)
    kept = {key: facts[key] for key, kind in KEPT_FACTS.items() if type(facts.get(key)) is kind}
    if "url" in kept:
        kept["url"] = printable(kept["url"])
    return _Sample(name, caption, parts["picture"], kept)


def _expected_samples(tar: Path, name: str, account: Account) -> int:
    """How many samples the tar should hold by the _stats.json beside it; 0 if there is none."""
    path = tar.with_name(f"{tar.stem}_stats.json")
    if not path.is_file():
        return 0
    try:
        if not is_inside(path, tar.parent.resolve()) or path.stat().st_size > LARGEST_STATS_BYTES:
            raise ValueError
        successes = json.loads(path.read_bytes())["successes"]
        if type(successes) is not int:
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        account.spoil("unreadable _stats.json", name)
        return 0
    return successes


def _samples(tar: Path, tar_name: str, config: CorpusConfig, account: Account) -> Iterator[_Sample]:
    """Every sample with a caption and the bytes of a picture; the others are counted."""
    seen: set[str] = set()
    num_failed = 0
    for group in _groups(tar, tar_name, config, account):
        name = f"{tar_name}/{group.key}"
        try:
            if group.key in seen:
                raise BadSample("duplicate key")
            seen.add(group.key)
            sample = _open_group(group, name)
        except _FailedDownload:
            num_failed += 1
            account.skip("failed download", name)
        except BadSample as error:
            account.spoil(error.reason, name)
        else:
            yield sample
    num_samples = len(seen) - num_failed
    expected = _expected_samples(tar, tar_name, account)
    if num_samples < expected:
        account.spoil("missing in the tar", f"{tar_name}, {num_samples} of {expected}", expected - num_samples)

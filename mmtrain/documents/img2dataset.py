"""The tars that img2dataset writes (webdataset output): KEY.jpg, KEY.txt and KEY.json side by side in NNNNN.tar.

They are read from front to back, one sample in memory at a time, and never unpacked. The .parquet beside a tar
is not read; of NNNNN_stats.json only how many samples the tar should hold.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mmtrain.config import CorpusConfig, UserError
from mmtrain.documents.captioned import (
    LARGEST_CAPTION_BYTES,
    PICTURE_SUFFIXES,
    id_of_path,
    is_inside,
    judge,
    largest_picture_bytes,
    relative_name,
)
from mmtrain.documents.document import Document
from mmtrain.documents.held_out import held_out_limit
from mmtrain.documents.images import BadImage, image_from_bytes
from mmtrain.documents.reading import Reading, printable
from mmtrain.documents.tars import DamagedTar, Member, read_members

SOURCE = "img2dataset"
HOW = "set corpus.path to the folder of tars that img2dataset wrote, or to one of them"
LARGEST_JSON_BYTES = 2**20
LARGEST_STATS_BYTES = 2**24
KEPT_FACTS = {"url": str, "original_width": int, "original_height": int}
DAMAGED = "damaged tar"
UNREADABLE = "unreadable file"
FAILED = "failed download"

# Called with a reason, what it is about, and how many of them.
Skip = Callable[[str, str, int], None]


class _BadSample(Exception):
    """A sample without a picture to look at. The message is one of a few fixed phrases to count by."""


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

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def _list_tars(config: CorpusConfig, skip: Skip) -> dict[str, Path]:
    """Name -> path of the tars to read, in the order of their names (paths relative to the folder)."""
    if not config.path:
        raise UserError(f"corpus {SOURCE} has no corpus.path; {HOW}.")
    root = Path(config.path)
    if not root.exists():
        raise UserError(f"corpus.path={config.path} does not exist; {HOW}.")
    if root.is_file() and root.suffix == ".tar":
        return {root.name: root}
    if not root.is_dir():
        raise UserError(f"corpus.path={config.path} is neither a folder nor a .tar; {HOW}.")
    found = {relative_name(path, root): path for path in root.rglob("*.tar")}
    found = {name: path for name, path in sorted(found.items()) if "/." not in f"/{name}"}
    if not found:
        raise UserError(f"corpus.path={config.path} holds no .tar; {HOW}.")
    tars = {}
    resolved = root.resolve()
    for name, path in found.items():
        if not is_inside(path, resolved):
            skip("path leaves the folder", name, 1)
        elif not path.is_file():  # a pipe would be read forever
            skip(UNREADABLE, name, 1)
        else:
            tars[name] = path
    return tars


def _split_name(name: str) -> tuple[str, str]:
    """Key and kind of a member, webdataset's way: the key ends at the first dot of the file name.

    The kind is "picture", "txt", "json", or "" for what is not needed. Raises _BadSample.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise _BadSample("path leaves the tar")
    stem, _, suffix = path.name.partition(".")
    if not stem or not suffix:
        raise _BadSample("name without a key")
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


def _groups(tar: Path, name: str, config: CorpusConfig, skip: Skip) -> Iterator[_Group]:
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
                        raise _BadSample("not a regular file")
                    next_key, kind = _split_name(member.name)
                except _BadSample as error:
                    skip(str(error), f"{name}/{member.name}", 1)
                    continue
                if key and (next_key != key or kind in parts):
                    yield _Group(key, parts, is_whole=True)
                    parts = {}
                key = next_key
                if kind:
                    parts[kind] = _read_part(member, kind, config)
    except (DamagedTar, OSError) as error:
        skip(DAMAGED if isinstance(error, DamagedTar) else UNREADABLE, f"{name}, {error}", 1)
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
        raise _BadSample("json is no JSON object")
    return content


def _find_caption(text: bytes | None, facts: dict[str, Any]) -> str:
    """One line from KEY.txt or, where there is none, from KEY.json. Raises _BadSample."""
    if text is None:
        caption = facts.get("caption")
        if not isinstance(caption, str):
            raise _BadSample("no caption")
        caption = printable(caption)  # a lone surrogate from a JSON escape cannot be stored as UTF-8
    else:
        try:
            caption = text.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise _BadSample("caption is not UTF-8") from None
    if len(caption.encode()) > LARGEST_CAPTION_BYTES:
        raise _BadSample("caption too long")
    if not caption.strip():
        raise _BadSample("empty caption")
    return " ".join(caption.split())


def _open_group(group: _Group, name: str) -> _Sample:
    """The sample of a group; the picture is not looked at. Raises _BadSample."""
    if not group.is_whole:
        raise _BadSample(DAMAGED)
    parts = {kind: data for kind, data in group.parts.items() if data is not None}
    if len(parts) < len(group.parts):
        raise _BadSample("member too large")
    facts = _parse_json(parts["json"]) if "json" in parts else {}
    if "picture" not in parts:
        raise _BadSample("no picture" if facts.get("status") in (None, "success") else FAILED)
    caption = _find_caption(parts.get("txt"), facts)
    kept = {key: facts[key] for key, kind in KEPT_FACTS.items() if type(facts.get(key)) is kind}
    if "url" in kept:
        kept["url"] = printable(kept["url"])
    return _Sample(name, caption, parts["picture"], kept)


def _expected_samples(tar: Path, name: str, skip: Skip) -> int:
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
        skip("unreadable _stats.json", name, 1)
        return 0
    return successes


def _samples(tars: dict[str, Path], config: CorpusConfig, skip: Skip) -> Iterator[_Sample]:
    """Every sample with a caption and the bytes of a picture, in the order of the tars; the others are skipped."""
    for tar_name, tar in tars.items():
        seen: set[str] = set()
        num_failed = 0
        for group in _groups(tar, tar_name, config, skip):
            name = f"{tar_name}/{group.key}"
            try:
                if group.key in seen:
                    raise _BadSample("duplicate key")
                seen.add(group.key)
                sample = _open_group(group, name)
            except _BadSample as error:
                num_failed += str(error) == FAILED
                skip(str(error), name, 1)
                continue
            yield sample
        num_samples = len(seen) - num_failed
        expected = _expected_samples(tar, tar_name, skip)
        if num_samples < expected:
            skip("missing in the tar", f"{tar_name}, {num_samples} of {expected}", expected - num_samples)


def read_img2dataset(config: CorpusConfig, split: str) -> Reading:
    """One document per captioned picture, in the order of the tars' names and then as they lie in the tar.

    meta: path (TAR/KEY), and url, original_width, original_height where the json has them. Bad pictures are counted
    in the pass of the side that their hash puts them on, everything else in the train pass, and a tar that cannot
    be read to its end in both. Raises UserError, when the iteration starts, where there is no tar, and at its end
    when nothing is usable or more than config.max_bad_fraction is bad (the train split; failed downloads are none).
    """

    def is_good(data: bytes) -> bool:
        try:
            image_from_bytes(data, config.max_pixels)
        except BadImage:
            return False
        return True

    def produce(reading: Reading) -> Iterator[Document]:
        def skip(reason: str, name: str, count: int) -> None:
            if split == "train" or reason in (DAMAGED, UNREADABLE):
                reading.skip(reason, name, count)

        tars = _list_tars(config, skip)
        hashes = ((sample.sha256, sample.data) for sample in _samples(tars, config, lambda *_: None))
        limit = held_out_limit(hashes, config.validation_fraction, is_good)
        num_documents = 0
        for sample in _samples(tars, config, skip):
            if (sample.sha256 < limit) != (split == "validation"):
                continue
            try:
                image = image_from_bytes(sample.data, config.max_pixels)
            except BadImage as error:
                reading.skip(error.reason, sample.name)
                continue
            if config.max_documents and num_documents == config.max_documents:
                return
            num_documents += 1
            meta = {"path": printable(sample.name), **sample.facts}
            yield Document(f"{SOURCE}-{id_of_path(sample.name)}", SOURCE, (sample.caption, image), meta)
        if split == "train":
            num_bad = sum(count for reason, count in reading.skipped.items() if reason != FAILED)
            judge(reading, num_bad, num_bad + num_documents, num_documents, SOURCE, config)

    return Reading(produce)

"""Check shards, and the files beside them, byte by byte."""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mmtrain.config import UserError, write_text_atomic
from mmtrain.shards.index import ShardIndex, load_index
from mmtrain.shards.manifest import DOCUMENTS, TOKENS, VOCABULARY, Manifest, ShardInfo, index_name
from mmtrain.tokens import MODALITIES, Vocabulary

SEAL = "checksums.json"
SHARD = re.compile(r"shard-\d{6,}\.(tar|index\.npz)")
AGAIN = "write the shards again"


def verify(folder: Path) -> None:
    """Recompute every hash and count of a folder of shards, of either kind.

    Raises UserError that names the first bad shard and its fault; returns nothing when all is well.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    faults = (find_fault(folder, manifest.kind, shard) for shard in manifest.shards)
    for fault in (*manifest_faults(folder), *filter(None, faults), *repeated_ids(folder)):
        raise UserError(f"{fault}; {AGAIN}")


def seal(folder: Path) -> None:
    """Write checksums.json: the SHA-256 of every file below `folder` that no manifest vouches for (hidden ones not)."""
    hashes = {path.relative_to(folder).as_posix(): _sha256(path) for path in _unvouched(folder)}
    write_text_atomic(folder / SEAL, json.dumps(hashes, indent=1))


def broken_seal(folder: Path) -> list[str]:
    """One clause per file that is not as `seal` found it."""
    path = folder / SEAL
    try:
        hashes = dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return [f"{path} is missing"]
    except (OSError, ValueError, TypeError) as error:
        return [f"{path} is damaged ({error})"]
    found = {file.relative_to(folder).as_posix(): _sha256(file) for file in _unvouched(folder)}
    return [
        f"{folder / name} is not what {path} says ({'changed' if name in found else 'missing'})"
        for name in sorted({*hashes, *found})
        if hashes.get(name) != found.get(name)
    ]


def manifest_faults(folder: Path) -> Iterator[str]:
    """What is wrong with manifest.json beside the shards; raises UserError where it cannot be read at all."""
    manifest = Manifest.load(folder)
    if manifest.kind not in (DOCUMENTS, TOKENS):
        yield f"the manifest of {folder} is damaged (kind {manifest.kind})"
    if manifest.kind == TOKENS:
        vocabulary = Vocabulary.load(folder / VOCABULARY)
        if vocabulary.fingerprint != manifest.fingerprints.get("vocabulary"):
            yield f"{folder / VOCABULARY} is not the vocabulary of these shards"
        elif vocabulary.dtype.name != manifest.dtype:
            yield f"the manifest of {folder} is damaged (type {manifest.dtype})"


def find_fault(folder: Path, kind: str, shard: ShardInfo) -> str:
    """What is wrong with a shard of a kind and its index, as a clause that names the file; "" when all is well."""
    try:
        for name, expected in ((shard.name, shard.sha256), (index_name(shard.name), shard.index_sha256)):
            if not (folder / name).is_file():
                return f"shard file {folder / name} is missing"
            if _sha256(folder / name) != expected:
                return f"shard file {folder / name} was changed (its SHA-256 differs)"
        vocabulary = Vocabulary.load(folder / VOCABULARY) if kind == TOKENS else None
        index = load_index(folder / index_name(shard.name), shard.bytes, shard.documents)
        fault = _fault(folder / shard.name, shard, index, vocabulary)
    except (UserError, OSError, ValueError, tarfile.TarError) as error:
        fault = str(error).removesuffix(f"; {AGAIN}")
    return fault and f"shard file {folder / shard.name} is wrong: {fault}"


def repeated_ids(folder: Path) -> list[str]:
    """A clause when a document id occurs twice in a folder; shards whose index cannot be read are passed over."""
    ids = [np.empty(0, np.bytes_)]
    for shard in Manifest.load(folder).shards:
        try:
            ids.append(load_index(folder / index_name(shard.name), shard.bytes, shard.documents).ids)
        except UserError:
            continue
    found = np.sort(np.concatenate(ids))
    twice = found[1:][found[1:] == found[:-1]]
    return [f"document id {twice[0].decode()} occurs twice in {folder}"] if len(twice) else []


def _unvouched(folder: Path) -> list[Path]:
    def is_vouched(name: Path) -> bool:
        return any(part.startswith(".") for part in name.parts) or name.name == SEAL or bool(SHARD.fullmatch(name.name))

    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if not is_vouched(path.relative_to(folder))]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault(path: Path, shard: ShardInfo, index: ShardIndex, vocabulary: Vocabulary | None) -> str:
    """Walk the tar and compare it with its index and its counts; "" when they agree."""
    documents = -1
    part = 0
    counts = np.zeros(len(MODALITIES), np.int64)
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, name = member.name.partition(".")
            span = (member.offset_data, member.size)
            if name == "json":
                documents += 1
                if (
                    documents >= len(index)
                    or index.ids[documents].decode() != key
                    or tuple(index.json[documents]) != span
                ):
                    return f"member {member.name} is not where the index says"
                continue
            if documents < 0 or key != index.ids[documents].decode() or part >= len(index.parts):
                return f"member {member.name} belongs to no document"
            offset, size = index.parts[part].tolist()
            if offset + size != sum(span) or (vocabulary is None and offset != span[0]):
                return f"member {member.name} is not where the index says"
            part += 1
            if vocabulary is not None:
                file = tar.extractfile(member)
                assert file is not None
                tokens = np.load(io.BytesIO(file.read()), allow_pickle=False)
                if tokens.dtype != vocabulary.dtype or tokens.ndim != 1 or tokens.nbytes != size:
                    return f"member {member.name} does not hold the tokens that the index says"
                if tokens.size and int(tokens.max()) >= vocabulary.sentinel_end:
                    return f"member {member.name} has ids outside the vocabulary"
                counts += np.bincount(vocabulary.modality(tokens), minlength=len(MODALITIES))
    if documents + 1 != shard.documents or part != len(index.parts):
        return f"it holds {documents + 1} documents instead of {shard.documents}"
    if counts[1:].tolist() != [shard.text_tokens, shard.image_tokens]:
        return f"it holds {counts[1]}, {counts[2]} text, image tokens, not {shard.text_tokens}, {shard.image_tokens}"
    return ""

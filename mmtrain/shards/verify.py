"""Check a folder of shards byte by byte."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np

from mmtrain.config import UserError
from mmtrain.shards.index import ShardIndex, load_index
from mmtrain.shards.manifest import TOKENS, VOCABULARY, ShardInfo, index_name, open_manifest
from mmtrain.tokens import MODALITIES, Vocabulary


def verify(folder: Path) -> None:
    """Recompute every hash and count of a folder of shards, of either kind.

    Raises UserError that names the first bad shard and its fault; returns nothing when all is well.
    """
    folder = Path(folder)
    manifest = open_manifest(folder, kind="")
    vocabulary = Vocabulary.load(folder / VOCABULARY) if manifest.kind == TOKENS else None
    if vocabulary and vocabulary.fingerprint != manifest.fingerprints.get("vocabulary"):
        raise UserError(f"{folder / VOCABULARY} is not the vocabulary of these shards; write the shards again")
    seen: set[bytes] = set()
    for shard in manifest.shards:
        for name, expected in ((shard.name, shard.sha256), (index_name(shard.name), shard.index_sha256)):
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise UserError(
                        f"shard file {folder / name} was changed (its SHA-256 differs); write the shards again"
                    )
        index = load_index(folder / index_name(shard.name), shard.bytes, shard.documents)
        fault = _fault(folder / shard.name, shard, index, vocabulary)
        if not fault and not seen.isdisjoint(index.ids.tolist()):
            fault = "a document id occurs twice"
        if fault:
            raise UserError(f"shard file {folder / shard.name} is wrong: {fault}; write the shards again")
        seen.update(index.ids.tolist())


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
    if vocabulary is not None and counts[1:].tolist() != [shard.text_tokens, shard.image_tokens]:
        return f"it holds {counts[1]}, {counts[2]} text, image tokens, not {shard.text_tokens}, {shard.image_tokens}"
    return ""

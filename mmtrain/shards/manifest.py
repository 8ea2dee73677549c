"""The manifest of a folder of shards: what must be there, and what made it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mmtrain.config import UserError, fingerprint, write_text_atomic

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.json"
DOCUMENTS, TOKENS = "documents", "tokens"


def shard_name(number: int) -> str:
    """File name of a shard; sorts in writing order up to a million shards."""
    return f"shard-{number:06d}.tar"


def index_name(shard: str) -> str:
    """File name of the index beside a shard."""
    return shard.removesuffix(".tar") + ".index.npz"


@dataclass(frozen=True)
class ShardInfo:
    """One tar and its index; token counts are 0 in document shards."""

    name: str
    bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str
    documents: int
    text_tokens: int
    image_tokens: int


@dataclass(frozen=True)
class Manifest:
    """Everything a reader checks before it trusts a folder.

    kind: "documents" or "tokens". dtype: of the token ids ("" for documents). fingerprints: of the vocabulary and
    the tokenizers that made the tokens (empty for documents).
    """

    kind: str
    dtype: str
    documents: int
    shards: tuple[ShardInfo, ...]
    fingerprints: dict[str, str]
    format_version: int = FORMAT_VERSION

    @property
    def text_tokens(self) -> int:
        """Text tokens of all shards."""
        return sum(shard.text_tokens for shard in self.shards)

    @property
    def image_tokens(self) -> int:
        """Image tokens of all shards."""
        return sum(shard.image_tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all tars."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Equal for equal content (12 hexadecimal digits)."""
        return fingerprint("shards", self.format_version, self.kind, [shard.sha256 for shard in self.shards])

    def save(self, folder: Path) -> None:
        """Write manifest.json atomically; the last file of a folder, it makes the folder readable."""
        write_text_atomic(Path(folder) / MANIFEST, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read manifest.json and check it against itself. Raises UserError if it is missing, damaged or too new."""
        path = Path(folder) / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(
                f"{folder} has no {MANIFEST}: it holds no shards or their writing was interrupted; write them again"
            ) from error
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path} ({error}); write the shards again") from error
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version}, this program reads {FORMAT_VERSION}; write the shards again"
            )
        try:
            shards = tuple(ShardInfo(**shard) for shard in content.pop("shards"))
            manifest = cls(shards=shards, **content)
            total = sum(shard.documents for shard in shards)
        except (TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}); write the shards again") from error
        # Names are joined to the folder's path: a manifest from a stranger must not lead elsewhere.
        wrong = [shard.name for number, shard in enumerate(shards) if shard.name != shard_name(number)]
        if wrong or total != manifest.documents:
            fault = (
                f"unexpected shard name {wrong[0]!r}"
                if wrong
                else f"{total} documents in shards, {manifest.documents} in all"
            )
            raise UserError(f"{path} is damaged ({fault}); write the shards again")
        return manifest


def open_manifest(folder: Path, kind: str) -> Manifest:
    """Load the manifest and check that every shard and index is there in full size (SHA-256 only in `verify`).

    Raises UserError that names the first shard at fault, or if the folder holds shards of another kind.
    """
    manifest = Manifest.load(folder)
    if kind and manifest.kind != kind:
        raise UserError(f"{folder} holds {manifest.kind} shards, {kind} shards are needed; give another folder")
    for shard in manifest.shards:
        for name, size in ((shard.name, shard.bytes), (index_name(shard.name), shard.index_bytes)):
            path = Path(folder) / name
            if not path.is_file():
                raise UserError(f"shard file {path} is missing; restore it or write the shards again")
            if path.stat().st_size != size:
                raise UserError(
                    f"shard file {path} has {path.stat().st_size:,} bytes instead of {size:,}; "
                    "restore it or write the shards again"
                )
    return manifest

"""The manifest of a folder of shards: what must be there, and what made it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mmtrain.config import StoreConfig, UserError, fingerprint, write_text_atomic
from mmtrain.shards.store import Store, open_store

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


@dataclass(frozen=True, slots=True)
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
    def load(cls, location: str | Path | Store) -> "Manifest":
        """Read manifest.json and check it against itself. Raises UserError if it is missing, damaged or too new."""
        store = _store(location)
        path = store.where(MANIFEST)
        try:
            with store.open(MANIFEST) as file:
                text = file.read().decode()
            content = json.loads(text)
        except FileNotFoundError as error:
            raise UserError(
                f"{store.location} has no {MANIFEST}: it holds no shards or their writing was interrupted; "
                "write them again"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot read {path} ({error}); write the shards again") from error
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version}, this program reads {FORMAT_VERSION}; write the shards again"
            )
        try:
            shards = tuple(ShardInfo(**shard) for shard in content.pop("shards"))
            manifest = cls(shards=shards, **content)
        except (TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}); write the shards again") from error
        fault = manifest._fault()
        if fault:
            raise UserError(f"{path} is damaged ({fault}); write the shards again")
        return manifest

    def _fault(self) -> str:
        """What is wrong, or ""."""
        if not isinstance(self.fingerprints, dict):
            return "no fingerprints"
        for number, shard in enumerate(self.shards):
            # Names are joined to the folder's path: they must not lead elsewhere.
            if shard.name != shard_name(number):
                return f"unexpected shard name {shard.name!r}"
            counts = (shard.bytes, shard.index_bytes, shard.documents, shard.text_tokens, shard.image_tokens)
            for count in counts:
                if type(count) is not int or count < 0:
                    return f"{count!r} as a size of {shard.name}"
            if not (isinstance(shard.sha256, str) and isinstance(shard.index_sha256, str)):
                return f"no SHA-256 of {shard.name}"
        total = sum(shard.documents for shard in self.shards)
        return "" if total == self.documents else f"{total} documents in shards, {self.documents} in all"


def open_manifest(location: str | Path | Store, kind: str) -> Manifest:
    """Load the manifest and check that a local folder holds every shard and index in full size.

    Files of other stores are checked, SHA-256 included, when they are fetched; those of a folder in `verify`.
    Raises UserError that names the first shard at fault, or if the folder holds shards of another kind.
    """
    store = _store(location)
    manifest = Manifest.load(store)
    if kind and manifest.kind != kind:
        raise UserError(
            f"{store.location} holds {manifest.kind} shards, {kind} shards are needed; give another folder"
        )
    sizes = store.sizes()
    if sizes is None:
        return manifest
    for shard in manifest.shards:
        for name, size in ((shard.name, shard.bytes), (index_name(shard.name), shard.index_bytes)):
            found = sizes.get(name)
            if found is None:
                raise UserError(f"shard file {store.where(name)} is missing; restore it or write the shards again")
            if found != size:
                raise UserError(
                    f"shard file {store.where(name)} has {found:,} bytes instead of {size:,}; "
                    "restore it or write the shards again"
                )
    return manifest


def _store(location: str | Path | Store) -> Store:
    return location if isinstance(location, Store) else open_store(location, StoreConfig())

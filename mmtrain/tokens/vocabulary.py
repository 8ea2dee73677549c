"""One id space for specials, text, image codes and sentinels."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import numpy as np

from mmtrain.config import UserError, fingerprint, write_text_atomic

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<break>", "<eoss>")
MODALITIES = ("special", "text", "image")
SPECIAL, TEXT, IMAGE = range(len(MODALITIES))

VERSION = 1
# Embedding and output matrices with a multiple of 128 rows keep tensor cores on their fast tiles.
PADDING_MULTIPLE = 128

Ids = TypeVar("Ids", bound=Any)  # numpy array or torch tensor of integers


@dataclass(frozen=True)
class Vocabulary:
    """Ranges of ids, in this order: 6 specials, text, image codes, sentinels, unused ids up to a multiple of 128."""

    text_size: int
    image_codes: int
    num_sentinels: int

    pad: ClassVar[int] = 0
    bos: ClassVar[int] = 1
    eos: ClassVar[int] = 2
    unk: ClassVar[int] = 3
    brk: ClassVar[int] = 4
    eoss: ClassVar[int] = 5

    def __post_init__(self) -> None:
        if self.text_size < 1 or self.image_codes < 0 or self.num_sentinels < 0:
            raise ValueError(f"a vocabulary cannot have these sizes: {self}")

    @property
    def text_start(self) -> int:
        """First id of text."""
        return len(SPECIALS)

    @property
    def text_end(self) -> int:
        """One past the last id of text; so with the other ends."""
        return self.text_start + self.text_size

    @property
    def image_start(self) -> int:
        """First id of image codes."""
        return self.text_end

    @property
    def image_end(self) -> int:
        """One past the last image code."""
        return self.image_start + self.image_codes

    @property
    def sentinel_start(self) -> int:
        """Id of `<sentinel:0>`."""
        return self.image_end

    @property
    def sentinel_end(self) -> int:
        """One past the last sentinel; ids from here up to `size` are never used."""
        return self.sentinel_start + self.num_sentinels

    @property
    def size(self) -> int:
        """Rows of the embedding: all ids, padded to a multiple of 128."""
        return -(-self.sentinel_end // PADDING_MULTIPLE) * PADDING_MULTIPLE

    @property
    def dtype(self) -> np.dtype:
        """Smallest unsigned type on disk that holds every id: uint16 or uint32."""
        return np.dtype(np.uint16 if self.size <= 1 << 16 else np.uint32)

    @property
    def fingerprint(self) -> str:
        """Equal for equal id spaces (12 hexadecimal digits)."""
        return fingerprint("vocabulary", VERSION, self.text_size, self.image_codes, self.num_sentinels)

    def modality(self, ids: Ids) -> Ids:
        """0 special (sentinels and unused ids included), 1 text, 2 image, for each of `ids`.

        ids: integers of any shape, numpy or torch. Returns int64 of the same shape, kind and device.
        """
        text = (ids >= self.text_start) & (ids < self.text_end)
        image = (ids >= self.image_start) & (ids < self.image_end)
        return cast(Ids, text * TEXT + image * IMAGE)

    def describe(self) -> dict[str, Any]:
        """What `vocabulary.json` holds: sizes, ranges [start, end) and the fingerprint."""
        return {
            "version": VERSION,
            "text_size": self.text_size,
            "image_codes": self.image_codes,
            "num_sentinels": self.num_sentinels,
            "specials": {name: id for id, name in enumerate(SPECIALS)},
            "ranges": {
                "text": [self.text_start, self.text_end],
                "image": [self.image_start, self.image_end],
                "sentinel": [self.sentinel_start, self.sentinel_end],
            },
            "size": self.size,
            "dtype": self.dtype.name,
            "fingerprint": self.fingerprint,
        }

    def save(self, path: Path) -> None:
        """Write `vocabulary.json` (atomically)."""
        write_text_atomic(Path(path), json.dumps(self.describe(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """Read `vocabulary.json`. Raises UserError if it is unreadable, of another version or was changed."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            vocabulary = cls(content["text_size"], content["image_codes"], content["num_sentinels"])
            described = vocabulary.describe()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read the vocabulary {path} ({error}); build the data set again") from error
        if content != described:
            changed = sorted(key for key in described.keys() | content.keys() if described.get(key) != content.get(key))
            raise UserError(
                f"{path} is not as it was written ({', '.join(changed)} do not fit the sizes); "
                "restore it or build the data set again"
            )
        return vocabulary

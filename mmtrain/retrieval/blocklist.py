"""The block list: what evaluation sets hold, so that a memory never gives it away.

A text is in it that shares a run of 13 words with an evaluation document (GPT-3, appendix C), or, for shorter texts,
the whole of it; a picture, when its bytes or its perceptual hash are those of an evaluation picture, but for 3 bits.
"""

import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from mmtrain.config import UserError
from mmtrain.documents import Document
from mmtrain.documents.clusters import MOST_COLOR_DIFFERENCE
from mmtrain.documents.signatures import COLOR_CELLS, WORD, mix, sign

RUN_WORDS = 13
FEWEST_WORDS = 5  # "a red bus" is said of many pictures
MOST_BITS = 3


@dataclass(frozen=True)
class BlockList:
    """runs: (r,) uint64, sorted hashes of runs of words. lengths: (l,) int64, of how many words there are some.

    pictures: (p,) uint64, perceptual hashes that say something, with colors (p, 48) uint8. digests: (b,) sorted
    uint64, of the bytes of all pictures.
    """

    runs: np.ndarray
    lengths: np.ndarray
    pictures: np.ndarray
    colors: np.ndarray
    digests: np.ndarray

    @classmethod
    def of(cls, documents: Iterable[Document]) -> "BlockList":
        """The block list of evaluation documents."""
        runs, pictures, colors, digests = [], [], [], []
        lengths: set[int] = set()
        for document in documents:
            words = _words(document)
            if len(words) >= FEWEST_WORDS:
                lengths.add(min(len(words), RUN_WORDS))
                runs.append(_runs(words, min(len(words), RUN_WORDS)))
            signed = sign(document)
            pictures.append(signed.picture_hash[signed.picture_tells])
            colors.append(signed.picture_colors[signed.picture_tells])
            digests.append(_short(signed.picture_digest))
        empty = np.empty(0, np.uint64)
        return cls(
            np.unique(np.concatenate([empty, *runs])),
            np.array(sorted(lengths), np.int64),
            np.concatenate([empty, *pictures]),
            np.concatenate([np.empty((0, 3 * COLOR_CELLS**2), np.uint8), *colors]),
            np.unique(np.concatenate([empty, *digests])),
        )

    def blocks(self, window: Document) -> bool:
        """Whether a text or a picture of the window is in the list."""
        words = _words(window)
        if any(_any_in(_runs(words, length), self.runs) for length in self.lengths.tolist()):
            return True
        if not window.images:
            return False
        signed = sign(window)
        if _any_in(_short(signed.picture_digest), self.digests):
            return True
        looks = zip(signed.picture_hash, signed.picture_colors, signed.picture_tells, strict=True)
        return any(tells and self._looks_like(look, colors) for look, colors, tells in looks)

    def _looks_like(self, look: np.uint64, colors: np.ndarray) -> bool:
        near = np.flatnonzero(np.bitwise_count(self.pictures ^ look) <= MOST_BITS)
        differences = np.abs(self.colors[near].astype(np.int16) - colors.astype(np.int16)).max(axis=1)
        return bool((differences <= MOST_COLOR_DIFFERENCE).any())

    def save(self, path: Path) -> None:
        """Write an .npz without pickles."""
        with open(path, "wb") as file:
            np.savez(file, **{item.name: getattr(self, item.name) for item in fields(self)})

    @classmethod
    def load(cls, path: Path) -> "BlockList":
        """Read what `save` wrote. Raises UserError for a damaged file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(*(file[item.name] for item in fields(cls)))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} is no block list ({error}); delete its folder, prepare again") from error


def _words(document: Document) -> np.ndarray:
    """(n,) uint64 hashes of the words of all texts, in order."""
    words = WORD.findall("\n".join(document.texts).casefold())
    return mix(np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in words], np.uint64))


def _runs(words: np.ndarray, length: int) -> np.ndarray:
    """(r,) uint64: a hash of every run of so many words."""
    if len(words) < length:
        return np.empty(0, np.uint64)
    places = mix(np.arange(1, length + 1, dtype=np.uint64) + np.uint64(length << 8)) | np.uint64(1)
    return mix((np.lib.stride_tricks.sliding_window_view(words, length) * places).sum(axis=1, dtype=np.uint64))


def _short(digests: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(digests[:, :8]).view(np.uint64).ravel()


def _any_in(values: np.ndarray, sorted_values: np.ndarray) -> bool:
    if not len(values) or not len(sorted_values):
        return False
    places = np.minimum(np.searchsorted(sorted_values, values), len(sorted_values) - 1)
    return bool((sorted_values[places] == values).any())

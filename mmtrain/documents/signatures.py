"""Signatures: what deduplication needs to know of a document, about 600 bytes of it, a pure function of its content.

Pictures: SHA-256, perceptual hash (pHash: signs of the lowest frequencies of the gray picture; Zauner 2010) and
4 x 4 mean colors, for a pHash does not see color. Texts: MinHash (Broder 1997) of their runs of five words.
All of it in integers, so that every machine computes the same.
"""

import hashlib
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from mmtrain.config import UserError
from mmtrain.config.randomness import random_stream
from mmtrain.documents.document import Document
from mmtrain.documents.images import BadImage, decode_stretched

DIGEST_BYTES = 32

PICTURE_SIDE = 32  # pixels that the frequencies are taken from, as in the public implementations of pHash
FREQUENCIES = 8
COLOR_CELLS = 4
GRAY = np.array([299, 587, 114])  # thousandths (ITU-R BT.601)
COSINE_SCALE = 1 << 12
_phase = np.outer(np.arange(FREQUENCIES), 2 * np.arange(PICTURE_SIDE) + 1) * np.pi / (2 * PICTURE_SIDE)
COSINES = np.rint(np.cos(_phase) * COSINE_SCALE).astype(np.int64)
# Re-encoding changes a coefficient by less than this (two gray levels of noise in every pixel). Where most of them
# are smaller, as in blank pictures, smooth gradients and the simplest drawings, a hash is shared by many.
NOISE = 32 * COSINE_SCALE**2
FEWEST_TELLING = 32

# Words, but single characters in the scripts that do not put blanks between words (Thai to Khmer, Chinese, Japanese).
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
SHINGLE_WORDS = 5
# Captions repeat: "a man riding a wave on top of a surfboard" is said of many pictures. In a shorter text one changed
# word is more than a near-duplicate may differ in, and whole copies are found without MinHash.
FEWEST_WORDS = 24
NUM_MINIMA = 128
SHINGLE_CHUNK = 1024
_draws = random_stream("minhash", 1).integers(0, 2**64, (2 * NUM_MINIMA + SHINGLE_WORDS, 1), dtype=np.uint64)
MULTIPLIERS, SUMMANDS, PLACES = _draws[:NUM_MINIMA] | 1, _draws[NUM_MINIMA:-SHINGLE_WORDS], _draws[-SHINGLE_WORDS:] | 1


@dataclass(frozen=True)
class Signatures:
    """n documents with m pictures, k of them with enough text, as columns in the order of the documents.

    ids: (n,) bytes. content: (n, 32) uint8, SHA-256 of texts and pictures in order. num_pictures: (n,) int32.
    has_minima: (n,) bool. text_minima: (k, 128) uint32, rows of the documents with `has_minima`.
    picture_digest: (m, 32) uint8, SHA-256. picture_hash: (m,) uint64, and picture_tells: (m,) bool, whether it
    says anything. picture_colors: (m, 48) uint8.
    """

    ids: np.ndarray
    content: np.ndarray
    num_pictures: np.ndarray
    has_minima: np.ndarray
    text_minima: np.ndarray
    picture_digest: np.ndarray
    picture_hash: np.ndarray
    picture_tells: np.ndarray
    picture_colors: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def concatenate(cls, parts: "Sequence[Signatures]") -> "Signatures":
        """All documents of the parts, in order."""
        parts = parts or [_EMPTY]
        return cls(*(np.concatenate([getattr(part, item.name) for part in parts]) for item in fields(cls)))

    def save(self, path: Path) -> None:
        """Write an .npz without pickles, the same bytes for the same documents."""
        with open(path, "wb") as file:
            np.savez(file, **{item.name: getattr(self, item.name) for item in fields(self)})

    @classmethod
    def load(cls, path: Path) -> "Signatures":
        """Read what `save` wrote. Raises UserError for a damaged file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                found = cls(*(file[item.name] for item in fields(cls)))
            n, m, k = len(found), int(found.num_pictures.sum()), int(found.has_minima.sum())
            lengths = [len(getattr(found, item.name)) for item in fields(cls)]
            if lengths != [n, n, n, n, k, m, m, m, m]:
                raise ValueError(f"columns of {lengths} rows")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} holds no signatures of documents ({error}); delete it, prepare again") from error
        return found


def sign(document: Document) -> Signatures:
    """The signatures of one document; `Signatures.concatenate` makes those of a partition of many."""
    content = hashlib.sha256()
    for segment in document.segments:
        data = segment.encode("utf-8", "replace") if isinstance(segment, str) else bytes.fromhex(segment.sha256)
        content.update(b"%c%d:" % (b"t" if isinstance(segment, str) else b"p", len(data)) + data)
    images = document.images
    minima = text_minima("\n".join(document.texts))
    looks = [picture_look(image.data) for image in images]
    return Signatures(
        ids=np.array([document.id.encode()]),
        content=_digests([content.digest()]),
        num_pictures=np.array([len(images)], dtype=np.int32),
        has_minima=np.array([minima is not None]),
        text_minima=np.empty((0, NUM_MINIMA), dtype=np.uint32) if minima is None else minima[None],
        picture_digest=_digests([bytes.fromhex(image.sha256) for image in images]),
        picture_hash=np.array([look[0] for look in looks], dtype=np.uint64),
        picture_tells=np.array([look[1] for look in looks], dtype=bool),
        picture_colors=np.array([look[2] for look in looks], dtype=np.uint8).reshape(-1, 3 * COLOR_CELLS**2),
    )


def text_minima(text: str) -> np.ndarray | None:
    """MinHash of a text: (128,) uint32, None for fewer than 24 words. Case and punctuation do not count.

    The share of equal entries of two texts estimates the Jaccard overlap of their runs of five words, with a
    standard error of at most 0.044.
    """
    words = WORD.findall(text.casefold())
    if len(words) < FEWEST_WORDS:
        return None
    hashes = np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in words], dtype=np.uint64)
    runs = np.lib.stride_tricks.sliding_window_view(hashes, SHINGLE_WORDS)
    shingles = mix((runs * PLACES[:, 0]).sum(axis=1, dtype=np.uint64))
    minima = np.full(NUM_MINIMA, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(shingles), SHINGLE_CHUNK):  # a long text must not need a gigabyte
        values = MULTIPLIERS * shingles[start : start + SHINGLE_CHUNK] + SUMMANDS
        np.minimum(minima, values.min(axis=1), out=minima)
    return (minima >> np.uint64(32)).astype(np.uint32)


def mix(values: np.ndarray) -> np.ndarray:
    """Scatter uint64 values over all of 64 bits (the finalizer of SplitMix64), one to one."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def perceptual_hash(pixels: np.ndarray) -> tuple[int, bool]:
    """pHash of a (32, 32, 3) uint8 picture: 64 bits, and whether they say anything.

    A bit tells whether one of the 8 x 8 lowest frequencies is above zero by more than noise; the mean brightness
    stays out. (The usual limit is their median: in drawings with a symmetry that is a zero that wavers.)
    """
    gray = (pixels @ GRAY) // 1000
    low = (COSINES @ gray @ COSINES.T).ravel()[1:]
    bits = np.packbits(np.append(low > NOISE, False))
    num_telling = np.count_nonzero(np.abs(low) > NOISE)
    return int.from_bytes(bits.tobytes(), "big"), bool(num_telling >= FEWEST_TELLING)


def picture_look(data: bytes) -> tuple[int, bool, np.ndarray]:
    """pHash, whether it says anything, and (48,) mean colors of 4 x 4 cells."""
    try:
        pixels = decode_stretched(data, PICTURE_SIDE)
    except BadImage:  # readers have looked at it; whatever it is, it looks like nothing else
        return 0, False, np.zeros(3 * COLOR_CELLS**2, dtype=np.uint8)
    cell = PICTURE_SIDE // COLOR_CELLS
    sums = pixels.reshape(COLOR_CELLS, cell, COLOR_CELLS, cell, 3).sum(axis=(1, 3), dtype=np.int64)
    return *perceptual_hash(pixels), (sums // cell**2).astype(np.uint8).ravel()


def _digests(values: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(values), dtype=np.uint8).reshape(-1, DIGEST_BYTES)


_EMPTY = Signatures(
    ids=np.empty(0, dtype="S1"),
    content=np.empty((0, DIGEST_BYTES), dtype=np.uint8),
    num_pictures=np.empty(0, dtype=np.int32),
    has_minima=np.empty(0, dtype=bool),
    text_minima=np.empty((0, NUM_MINIMA), dtype=np.uint32),
    picture_digest=np.empty((0, DIGEST_BYTES), dtype=np.uint8),
    picture_hash=np.empty(0, dtype=np.uint64),
    picture_tells=np.empty(0, dtype=bool),
    picture_colors=np.empty((0, 3 * COLOR_CELLS**2), dtype=np.uint8),
)

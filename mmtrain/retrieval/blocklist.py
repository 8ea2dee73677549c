"""The block list: what is in evaluation sets, so that it, and what is nearly the same, never gets into a memory.

Texts are compared by runs of 13 words, as in the decontamination of GPT-3 (Brown et al. 2020, appendix C): case and
punctuation do not count, and a run of 8 to 12 words counts where it is a whole text of an evaluation set. Pictures are
compared as deduplication does it, by file, perceptual hash and colors.
"""

import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from mmtrain.config import UserError
from mmtrain.config.randomness import random_stream
from mmtrain.documents import Document, Image
from mmtrain.documents.clusters import MOST_COLOR_DIFFERENCE
from mmtrain.documents.signatures import COLOR_CELLS, WORD, mix, picture_look

RUN_WORDS = 13
# A shorter text of an evaluation set blocks what contains it from the fewest words that GPT-3's authors trusted, and
# below that what is nothing but it: "a dog in the snow" is said of many pictures.
FEWEST_CONTAINED = 8
FEWEST_WORDS = 5
MOST_DIFFERENT_BITS = 3
# Hashes that differ in 3 bits have one of 4 bands the same.
BANDS = tuple(np.uint64(shift) for shift in (0, 16, 32, 48))
COMPARED_AT_ONCE = 1 << 16  # pairs of pictures

_draws = random_stream("blocklist", 1).integers(0, 2**64, (2, RUN_WORDS + 1), dtype=np.uint64)
PLACES, OF_LENGTH = _draws[0] | np.uint64(1), _draws[1]

Window = tuple[Sequence[str], Image | None]
"""The texts of a window in order, and its picture."""


@dataclass(frozen=True)
class BlockList:
    """Hashes of g runs of words and of p pictures.

    runs: (g,) uint64, sorted: every 13 words in a row, and all words of a text of 5 to 12. files: (f,) uint64, sorted:
    the first 64 bits of the SHA-256 of all pictures. picture_hash: (p,) uint64 and picture_colors: (p, 48) uint8, as in
    `Signatures`, of the pictures whose perceptual hash says anything.
    """

    runs: np.ndarray
    files: np.ndarray
    picture_hash: np.ndarray
    picture_colors: np.ndarray

    @classmethod
    def of(cls, documents: Iterable[Document]) -> "BlockList":
        """The block list of the documents of evaluation sets. Texts of fewer than five words block nothing."""
        runs: list[np.ndarray] = [np.empty(0, dtype=np.uint64)]
        files: list[int] = []
        looks: dict[int, tuple[int, np.ndarray]] = {}
        for document in documents:
            runs += [_blocked_runs(words) for words in _word_hashes(document.texts)]
            for image in document.images:
                file = _file(image)
                files.append(file)
                if file not in looks:
                    picture_hash, tells, colors = picture_look(image.data)
                    if tells:
                        looks[file] = picture_hash, colors
        rows = sorted(looks.items())
        return cls(
            runs=np.unique(np.concatenate(runs)),
            files=np.unique(np.array(files, dtype=np.uint64)),
            picture_hash=np.array([picture_hash for _, (picture_hash, _) in rows], dtype=np.uint64),
            picture_colors=np.array([colors for _, (_, colors) in rows], dtype=np.uint8).reshape(
                -1, 3 * COLOR_CELLS**2
            ),
        )

    def blocks(self, texts: Sequence[str], image: Image | None = None) -> bool:
        """Whether one window holds a text or a picture of an evaluation set."""
        return bool(self.blocked([(texts, image)])[0])

    def blocked(self, windows: Sequence[Window]) -> np.ndarray:
        """Which of n windows hold a text or a picture of an evaluation set: (n,) bool."""
        found = self._blocks_texts([texts for texts, _ in windows])
        # A picture is decoded only where nothing else has blocked its window.
        pictures = {i: image for i, (_, image) in enumerate(windows) if image is not None and not found[i]}
        files = np.array([_file(image) for image in pictures.values()], dtype=np.uint64)
        rows = np.array(list(pictures), dtype=np.int64)
        known = _is_in(files, self.files)
        found[rows[known]] = True
        if not len(self.picture_hash):
            return found
        rows = rows[~known]
        looks = [(row, *picture_look(pictures[row].data)) for row in rows.tolist()]
        telling = [(row, picture_hash, colors) for row, picture_hash, tells, colors in looks if tells]
        if telling:
            near = self.blocks_looks(
                np.array([picture_hash for _, picture_hash, _ in telling], dtype=np.uint64),
                np.array([colors for _, _, colors in telling], dtype=np.uint8),
            )
            found[np.array([row for row, _, _ in telling])[near]] = True
        return found

    def blocks_looks(self, picture_hash: np.ndarray, picture_colors: np.ndarray) -> np.ndarray:
        """Which pictures are near one of an evaluation set.

        picture_hash: (m,) uint64, of pictures that tell; picture_colors: (m, 48) uint8. Returns (m,) bool.
        """
        found = np.zeros(len(picture_hash), dtype=bool)
        for shift in BANDS:
            band = ((self.picture_hash >> shift) & np.uint64(0xFFFF)).astype(np.uint16)
            order = np.argsort(band, kind="stable")
            asked = np.flatnonzero(~found)
            key = ((picture_hash[asked] >> shift) & np.uint64(0xFFFF)).astype(np.uint16)
            first = np.searchsorted(band[order], key, side="left")
            count = np.searchsorted(band[order], key, side="right") - first
            ends = np.cumsum(count)
            for start in range(0, int(ends[-1]) if len(ends) else 0, COMPARED_AT_ONCE):
                pair = np.arange(start, min(start + COMPARED_AT_ONCE, int(ends[-1])))
                of_asked = np.searchsorted(ends, pair, side="right")
                ours = order[first[of_asked] + pair - (ends - count)[of_asked]]
                theirs = asked[of_asked]
                near = np.bitwise_count(self.picture_hash[ours] ^ picture_hash[theirs]) <= MOST_DIFFERENT_BITS
                ours, theirs = ours[near], theirs[near]
                difference = self.picture_colors[ours].astype(np.int16) - picture_colors[theirs].astype(np.int16)
                found[theirs[np.abs(difference).max(axis=1) <= MOST_COLOR_DIFFERENCE]] = True
        return found

    def _blocks_texts(self, texts: Sequence[Sequence[str]]) -> np.ndarray:
        """Which of n lists of texts hold a run of the list: (n,) bool."""
        runs = [_all_runs(words) for one in texts for words in _word_hashes(one)]
        owner = np.repeat(np.arange(len(texts)), [len(one) + (len(one) > 1) for one in texts])
        owner = np.repeat(owner, [len(of_text) for of_text in runs])
        found = np.zeros(len(texts), dtype=bool)
        if len(owner):
            found[owner[_is_in(np.concatenate(runs), self.runs)]] = True
        return found

    def save(self, path: Path) -> None:
        """Write an .npz without pickles, the same bytes for the same documents in any order."""
        with open(path, "wb") as file:
            np.savez(file, **{item.name: getattr(self, item.name) for item in fields(self)})

    @classmethod
    def load(cls, path: Path) -> "BlockList":
        """Read what `save` wrote. Raises UserError for a damaged file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                found = cls(*(file[item.name] for item in fields(cls)))
            shapes = [found.runs.ndim, found.files.ndim, found.picture_hash.ndim, *found.picture_colors.shape]
            kinds = [str(getattr(found, item.name).dtype) for item in fields(cls)]
            if shapes != [1, 1, 1, len(found.picture_hash), 3 * COLOR_CELLS**2] or kinds != [*["uint64"] * 3, "uint8"]:
                raise ValueError(f"columns of {kinds}")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} holds no block list ({error}); delete it and build the memory again") from error
        return found


def _word_hashes(texts: Sequence[str]) -> list[np.ndarray]:
    """Hashes of the words of each text and, of several, of all in a row: uint64."""
    hashes = [
        np.array([zlib.crc32(w.encode("utf-8", "replace")) for w in WORD.findall(text.casefold())], dtype=np.uint64)
        for text in texts
    ]
    return [*hashes, np.concatenate(hashes)] if len(hashes) > 1 else hashes


def _blocked_runs(words: np.ndarray) -> np.ndarray:
    """What a text of an evaluation set puts on the list."""
    return _runs(words, min(len(words), RUN_WORDS)) if len(words) >= FEWEST_WORDS else words[:0]


def _all_runs(words: np.ndarray) -> np.ndarray:
    """What may be on the list because of this text: itself when it is short, else all its runs of 8 to 13 words."""
    if len(words) < FEWEST_CONTAINED:
        return _blocked_runs(words)
    lengths = range(FEWEST_CONTAINED, min(len(words), RUN_WORDS) + 1)
    return np.concatenate([_runs(words, length) for length in lengths])


def _runs(words: np.ndarray, length: int) -> np.ndarray:
    """Hashes of all runs of so many words."""
    runs = np.lib.stride_tricks.sliding_window_view(words, length)
    return mix((runs * PLACES[:length]).sum(axis=1, dtype=np.uint64) + OF_LENGTH[length])


def _file(image: Image) -> int:
    return int(image.sha256[:16], 16)


def _is_in(values: np.ndarray, sorted_values: np.ndarray) -> np.ndarray:
    """Which values are among the sorted ones: (n,) bool."""
    place = np.searchsorted(sorted_values, values)
    inside = place < len(sorted_values)
    inside[inside] = sorted_values[place[inside]] == values[inside]
    return inside

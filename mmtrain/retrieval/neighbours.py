"""Read the neighbours artifact: neighbours of documents by index, or a memory to search."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mmtrain.config import RetrievalConfig, UserError
from mmtrain.documents import decode_square, encode_png
from mmtrain.retrieval.build import FIRST_HITS, FORMAT
from mmtrain.retrieval.encode import Parts, combine
from mmtrain.retrieval.hashed import PICTURE_SIZE, encode_picture, encode_text
from mmtrain.retrieval.search import exact_search, pick_diverse


class Neighbours:
    """Stored neighbours of query documents. Raises UserError at opening if the folder is not whole."""

    def __init__(self, folder: Path) -> None:
        self.facts = _open(folder)
        self._neighbours = _load(folder, "neighbours.npy", self.facts["queries"]["documents"])
        self._scores = _load(folder, "scores.npy", self.facts["queries"]["documents"])

    def __len__(self) -> int:
        return len(self._neighbours)

    def candidates(self, i: int) -> np.ndarray:
        """Memory indices of the neighbours of query document i, nearest first: (k,) int64, possibly empty."""
        row = self._neighbours[i]
        return row[row >= 0]

    def scores(self, i: int) -> np.ndarray:
        """Cosines of `candidates(i)`: (k,) float32, descending."""
        return self._scores[i][self._neighbours[i] >= 0]


class Memory:
    """The memory of the artifact, to be searched while generating. Indices are those of its document shards."""

    def __init__(self, folder: Path) -> None:
        facts = _open(folder)
        self._config = RetrievalConfig(**facts["retrieval"])
        self._vectors = _load(folder, "vectors.npy", facts["memory"]["documents"]).astype(np.float32)
        self._means = _load(folder, "means.npy", 2)

    def __len__(self) -> int:
        return len(self._vectors)

    def search_text(self, caption: str, k: int) -> list[int]:
        """Up to k documents that fit a caption best, best first, no two of them near-duplicates."""
        d = self._config.dimension
        return self._search(Parts(encode_text(caption, d)[None], np.zeros((1, d), np.float32)), k)

    def search_image(self, pixels: np.ndarray, k: int) -> list[int]:
        """The same for a picture: (S, S, 3) uint8 of any size S."""
        d = self._config.dimension
        picture = encode_picture(_resize(pixels), d)
        return self._search(Parts(np.zeros((1, d), np.float32), picture[None]), k)

    def _search(self, parts: Parts, k: int) -> list[int]:
        _, indices = exact_search(self._vectors, combine(parts, self._means), k * FIRST_HITS)
        row = indices[0]
        return row[pick_diverse(self._vectors[row], k, self._config.max_score)].tolist()


def _resize(pixels: np.ndarray) -> np.ndarray:
    """(S, S, 3) uint8 to the size the encoder looks at, the way stored pictures got there."""
    return decode_square(encode_png(pixels), PICTURE_SIZE)


def _open(folder: Path) -> dict[str, Any]:
    path = Path(folder) / "neighbours.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        version = facts["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the neighbours {path} ({error}); build them again") from error
    if version != FORMAT:
        raise UserError(f"{path} has format {version}, this version reads {FORMAT}; build the neighbours again")
    return facts


def _load(folder: Path, name: str, rows: int) -> np.ndarray:
    path = Path(folder) / name
    try:
        array = np.load(path, mmap_mode="r" if rows else None, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); build the neighbours again") from error
    if len(array) != rows:
        raise UserError(f"{path} has {len(array)} rows, not the {rows} that neighbours.json says; build it again")
    return array.view(np.ndarray)  # still mapped, but rows of a plain array are read several times faster

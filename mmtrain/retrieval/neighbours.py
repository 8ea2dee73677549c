"""Read the neighbours artifact: the candidates of each document of a split, and why others are none."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmtrain.retrieval.build import MEMORY, NEIGHBOURS
from mmtrain.retrieval.encode import CHANNELS
from mmtrain.retrieval.filters import REASONS
from mmtrain.retrieval.memory import FACTS, load_rows, read_facts


class Hit(NamedTuple):
    """A window of the memory that a search found. reason: why it is no candidate, "" for one."""

    number: int
    score: float
    reason: str


class Neighbours:
    """Stored candidates of the documents of a split.

    channels: the queries whose candidates count, by text (0), by image (1). Raises UserError at opening if the folder
    is not whole.
    """

    def __init__(self, folder: Path, channels: Sequence[int] = CHANNELS) -> None:
        folder, self._channels = Path(folder), list(channels)
        self.facts = read_facts(folder / NEIGHBOURS)
        rows = self.facts["queries"]["documents"]
        self._numbers = load_rows(folder, "numbers.npy", rows)
        self._scores = load_rows(folder, "scores.npy", rows)
        self._reasons = load_rows(folder, "reasons.npy", rows)
        memory = folder.parent / MEMORY
        self._windows = load_rows(memory, "windows.npy", read_facts(memory / FACTS)["windows"])

    def __len__(self) -> int:
        return len(self._numbers)

    def candidates(self, i: int) -> np.ndarray:
        """Windows of the memory that document i may get, each once, best first: (k,) int64, possibly empty."""
        numbers, scores = self._candidates(i)
        return numbers

    def scores(self, i: int) -> np.ndarray:
        """Cosines of `candidates(i)`: (k,) float32, descending; the better one where both queries found a window."""
        return self._candidates(i)[1]

    def hits(self, i: int, channel: int) -> list[Hit]:
        """What the text query (0) or the image query (1) of document i found, best first, with what was left out."""
        rows = zip(
            self._numbers[i, channel].tolist(),
            self._scores[i, channel].tolist(),
            self._reasons[i, channel].tolist(),
            strict=True,
        )
        return [Hit(number, score, REASONS[reason]) for number, score, reason in rows if number >= 0]

    def place(self, number: int) -> tuple[int, int, int]:
        """Document, window of it, and number of its windows, of a window of the memory."""
        document, window, count = self._windows[number].tolist()
        return document, window, count

    def _candidates(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        numbers, scores, reasons = (
            column[i][self._channels].ravel() for column in (self._numbers, self._scores, self._reasons)
        )
        usable = np.flatnonzero((numbers >= 0) & (reasons == 0))
        order = usable[np.lexsort((numbers[usable], -scores[usable]))]
        _, first = np.unique(numbers[order], return_index=True)
        order = order[np.sort(first)]
        return numbers[order], scores[order]

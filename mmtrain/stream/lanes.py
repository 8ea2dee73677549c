"""A lane: an endless sequence of packed rows, each a pure function of the lane's state before it.

Lane l of L takes the documents at global positions l, l + L, l + 2L, ... of every source, so that all lanes
together deliver each document once per epoch whatever the number of documents.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmtrain.config import UserError
from mmtrain.objective import TrainingSequence
from mmtrain.stream.mixture import neediest
from mmtrain.stream.packing import fullest_subset
from mmtrain.stream.source import Recipe, Source

PLACES_BLOCK = 256  # places computed at once: one costs as much as a few hundred


@dataclass(frozen=True)
class Waiting:
    """A document in the look-ahead buffer: `number` counts the documents this lane took from the source."""

    source: str
    number: int
    sequence: TrainingSequence


@dataclass(frozen=True)
class LaneState:
    """A lane between two rows. row: rows delivered; taken, drawn: documents and tokens taken from each source."""

    row: int
    taken: Mapping[str, int]
    drawn: Mapping[str, int]
    waiting: tuple[Waiting, ...]

    def plain(self) -> dict[str, Any]:
        """The state as JSON-able integers; the waiting documents are made again from their numbers."""
        waiting = [[entry.source, entry.number] for entry in self.waiting]
        return {"row": self.row, "taken": dict(self.taken), "drawn": dict(self.drawn), "waiting": waiting}


class Lane:
    """One lane with its recent states, so that a step back for a checkpoint costs nothing."""

    def __init__(
        self, index: int, num_lanes: int, sources: Mapping[str, Source], recipe: Recipe, lookahead: int, history: int
    ) -> None:
        self._index, self._num_lanes = index, num_lanes
        self._sources, self._recipe = sources, recipe
        self._weights = {name: source.weight for name, source in sources.items()}
        self._lookahead, self._history = lookahead, history
        self._places: dict[str, tuple[int, np.ndarray, np.ndarray]] = {}
        nothing = dict.fromkeys(sources, 0)
        self._bases = {0: LaneState(0, nothing, nothing, ())}
        self._recent: OrderedDict[int, LaneState] = OrderedDict()

    def row(self, number: int) -> list[TrainingSequence]:
        """The sequences of row `number`; cheapest in ascending order, right in any."""
        state, packed = self._advance(self.state(number))
        self._remember(state)
        return packed

    def state(self, number: int) -> LaneState:
        """The state before row `number`, replayed from the nearest known state where it must be."""
        known = self._recent.get(number) or self._bases.get(number)
        if known:
            return known
        start = max(row for row in (*self._bases, *self._recent) if row < number)
        state = self._recent.get(start) or self._bases[start]
        while state.row < number:
            state, _ = self._advance(state)
            self._remember(state)
        return state

    def load(self, plain: Mapping[str, Any], keep_drawn: bool) -> None:
        """Start from a state that `LaneState.plain` wrote; sources new since then start at their first document.

        keep_drawn: the mixture is the same as then; else it starts to count anew, so that a new source is not
        drawn alone until it has caught up.
        """
        try:
            taken = {name: int(plain["taken"].get(name, 0)) for name in self._sources}
            drawn = {name: int(plain["drawn"].get(name, 0)) if keep_drawn else 0 for name in self._sources}
            waiting = tuple(self._take(name, int(number)) for name, number in plain["waiting"])
            state = LaneState(int(plain["row"]), taken, drawn, waiting)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the stream state of lane {self._index} is damaged ({error!r})") from error
        self._recent.clear()
        self._bases = {0: self._bases[0], state.row: state}

    def _advance(self, state: LaneState) -> tuple[LaneState, list[TrainingSequence]]:
        """Fill the buffer, pack one row, return the state behind it."""
        taken, drawn, waiting = dict(state.taken), dict(state.drawn), list(state.waiting)
        capacity = self._recipe.max_length
        lengths = [len(entry.sequence) for entry in waiting]
        # A row's worth of tokens and `lookahead` documents more: short documents need as much choice as long ones.
        while sum(lengths[: -self._lookahead]) < capacity:
            name = neediest(self._weights, drawn)
            entry = self._take(name, taken[name])
            waiting.append(entry)
            lengths.append(len(entry.sequence))
            taken[name] += 1
            drawn[name] += lengths[-1]
        chosen = set(fullest_subset(lengths, capacity))
        packed = [entry.sequence for i, entry in enumerate(waiting) if i in chosen]
        left = tuple(entry for i, entry in enumerate(waiting) if i not in chosen)
        return LaneState(state.row + 1, taken, drawn, left), packed

    def _take(self, name: str, number: int) -> Waiting:
        source = self._sources[name]
        block, offset = divmod(number, PLACES_BLOCK)
        known = self._places.get(name)
        if known is None or known[0] != block:
            numbers = block * PLACES_BLOCK + np.arange(PLACES_BLOCK)
            known = (block, *self._recipe.places(source, self._index + self._num_lanes * numbers))
            self._places[name] = known
        _, epochs, indices = known
        return Waiting(name, number, self._recipe.sequence(source, int(epochs[offset]), int(indices[offset])))

    def _remember(self, state: LaneState) -> None:
        self._recent[state.row] = state
        self._recent.move_to_end(state.row)
        while len(self._recent) > self._history:
            self._recent.popitem(last=False)

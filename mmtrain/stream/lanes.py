"""A lane: an endless sequence of packed rows, each a pure function of the lane's state before it.

Lane l of L takes the documents at global positions l, l + L, l + 2L, ... of every source, so that all lanes
together deliver each document once per epoch whatever the number of documents.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmtrain.config import UserError
from mmtrain.objective import TrainingSequence
from mmtrain.stream.mixture import draw, neediest
from mmtrain.stream.order import Order
from mmtrain.stream.packing import fullest_subset
from mmtrain.stream.source import Recipe, Source

PLACES_BLOCK = 256  # places computed at once: one costs as much as a few hundred


@dataclass(frozen=True)
class Waiting:
    """A sequence in the look-ahead buffer: a window of document `number` that this lane took from the source.

    epoch, index: which document of the source that is.
    """

    source: str
    number: int
    sequence: TrainingSequence
    epoch: int
    index: int


@dataclass(frozen=True)
class LaneState:
    """A lane between two rows. row: rows delivered; taken, credit: documents taken from each source, and its credit."""

    row: int
    taken: Mapping[str, int]
    credit: Mapping[str, int]
    waiting: tuple[Waiting, ...]

    def plain(self) -> dict[str, Any]:
        """The state as JSON-able integers; what waits is made again from its numbers."""
        waiting = [[entry.source, entry.number, entry.sequence.window] for entry in self.waiting]
        return {"row": self.row, "taken": dict(self.taken), "credit": dict(self.credit), "waiting": waiting}


class Lane:
    """One lane with its recent states, so that a step back for a checkpoint costs nothing."""

    def __init__(
        self,
        index: int,
        num_lanes: int,
        sources: Mapping[str, Source],
        orders: Mapping[str, Order],
        quotas: Callable[[int], Mapping[str, int]],
        recipe: Recipe,
        lookahead: int,
        history: int,
    ) -> None:
        """orders: of the documents of each source. quotas: number of a row of this lane -> credit per token."""
        self._index, self._num_lanes = index, num_lanes
        self._sources, self._orders, self._quotas, self._recipe = sources, orders, quotas, recipe
        self._lookahead, self._history = lookahead, history
        self._places: dict[str, tuple[int, np.ndarray, np.ndarray]] = {}
        nothing = dict.fromkeys(sources, 0)
        self._bases = {0: LaneState(0, nothing, nothing, ())}
        self._recent: OrderedDict[int, LaneState] = OrderedDict()

    def row(self, number: int) -> tuple[list[Waiting], LaneState]:
        """What row `number` holds, and the state behind it; cheapest in ascending order, right in any."""
        state, packed = self._advance(self.state(number))
        self._remember(state)
        return packed, state

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

    def load(self, plain: Mapping[str, Any]) -> None:
        """Start from a state that `LaneState.plain` wrote; sources new since then start at their first document."""
        try:
            taken = {name: int(plain["taken"].get(name, 0)) for name in self._sources}
            credit = {name: int(plain["credit"].get(name, 0)) for name in self._sources}
            documents = {(str(name), int(number)) for name, number, _ in plain["waiting"]}
            made = {(name, number): self._take(name, number) for name, number in documents}
            waiting = tuple(made[str(name), int(number)][int(window)] for name, number, window in plain["waiting"])
            state = LaneState(int(plain["row"]), taken, credit, waiting)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the stream state of lane {self._index} is damaged ({error!r})") from error
        self._recent.clear()
        self._bases = {0: self._bases[0], state.row: state}

    def _advance(self, state: LaneState) -> tuple[LaneState, list[Waiting]]:
        """Fill the buffer, pack one row, return the state behind it."""
        taken, credit, waiting = dict(state.taken), dict(state.credit), list(state.waiting)
        capacity = self._recipe.max_length
        quota = self._quotas(state.row)
        lengths = [len(entry.sequence) for entry in waiting]
        # A row's worth of tokens and `lookahead` sequences more: short ones need as much choice as long ones.
        while sum(lengths[: -self._lookahead]) < capacity:
            name = neediest(quota, credit)
            entries = self._take(name, taken[name])
            waiting += entries
            lengths += [len(entry.sequence) for entry in entries]
            taken[name] += 1
            draw(quota, credit, name, sum(lengths[-len(entries) :]))
        chosen = set(fullest_subset(lengths, capacity))
        packed = [entry for i, entry in enumerate(waiting) if i in chosen]
        left = tuple(entry for i, entry in enumerate(waiting) if i not in chosen)
        return LaneState(state.row + 1, taken, credit, left), packed

    def _take(self, name: str, number: int) -> list[Waiting]:
        """The windows of document `number` of this lane."""
        block, offset = divmod(number, PLACES_BLOCK)
        known = self._places.get(name)
        if known is None or known[0] != block:
            numbers = block * PLACES_BLOCK + np.arange(PLACES_BLOCK)
            known = (block, *self._orders[name].places(self._index + self._num_lanes * numbers))
            self._places[name] = known
            self._sources[name].prefetch(known[2].tolist())
        _, epochs, indices = known
        epoch, index = int(epochs[offset]), int(indices[offset])
        sequences = self._recipe.sequences(self._sources[name], epoch, index)
        return [Waiting(name, number, sequence, epoch, index) for sequence in sequences]

    def _remember(self, state: LaneState) -> None:
        self._recent[state.row] = state
        self._recent.move_to_end(state.row)
        while len(self._recent) > self._history:
            self._recent.popitem(last=False)

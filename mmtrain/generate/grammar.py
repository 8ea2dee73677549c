"""Which ids each new position may take: a finite automaton over classes of ids, and several of them in one batch.

A class is all of text, all image codes, or one special id. Beside its states an automaton has a budget of tokens: a
state never allows an id after which the budget would not reach to the end.
N states, C classes, B sequences, U ids from the first to the last that any of them may take.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mmtrain.objective import NO_CELL
from mmtrain.tokens import Vocabulary

END = 0
NEVER, TEXT, IMAGE, FIRST_SPECIAL = range(4)  # classes; from FIRST_SPECIAL on a class is one id


@dataclass(frozen=True, eq=False)
class Grammar:
    """The automaton of one task. State 0 is the end: it allows nothing.

    class_of: (V,) int64 class of each id; allow: (N, C) bool; next: (N, C) int64 state after an id of a class;
    cell: (N,) int32, the cell of the image code written in a state; progress: (N,) float32, 0 at the first code of
    a picture to 1 at its last; max_length: most tokens until the end.
    """

    vocabulary: Vocabulary
    class_of: np.ndarray
    allow: np.ndarray
    next: np.ndarray
    cell: np.ndarray
    progress: np.ndarray
    start: int
    max_length: int

    def __post_init__(self) -> None:
        if self.needed[self.start] > self.max_length:
            raise ValueError(f"{self.max_length} tokens are too few: the end takes {self.needed[self.start]}")

    @cached_property
    def needed(self) -> np.ndarray:
        """(N,) int64: fewest tokens from each state to the end."""
        before: list[list[int]] = [[] for _ in self.allow]
        for state, kind in np.argwhere(self.allow).tolist():
            before[self.next[state, kind]].append(state)
        needed = np.full(len(self.allow), np.iinfo(np.int32).max, dtype=np.int64)
        needed[END] = 0
        waiting = deque([END])
        while waiting:
            state = waiting.popleft()
            for previous in before[state]:
                if needed[previous] > needed[state] + 1:
                    needed[previous] = needed[state] + 1
                    waiting.append(previous)
        return needed

    @cached_property
    def is_drawing(self) -> np.ndarray:
        """(N,) bool: states that write an image code and nothing else; there guidance applies."""
        return self.allow[:, IMAGE] & (self.allow.sum(axis=1) == 1)

    @classmethod
    def picture(cls, vocabulary: Vocabulary, cells: np.ndarray) -> "Grammar":
        """Exactly `len(cells)` image codes that stand in these cells."""
        states = _States()
        return states.grammar(vocabulary, states.codes(cells, END), len(cells))

    @classmethod
    def text(cls, vocabulary: Vocabulary, max_tokens: int, stop: int) -> "Grammar":
        """1 to `max_tokens` ids of text, then the id `stop`."""
        states = _States()
        more = states.add({stop: END})
        states.edges[more]["text"] = more
        return states.grammar(vocabulary, states.add({"text": more}), max_tokens + 1)

    @classmethod
    def infill(cls, vocabulary: Vocabulary, spans: Sequence[int | np.ndarray]) -> "Grammar":
        """Masked spans after a prompt that ends with `<sentinel:0>`, as `objective.rotate` lays them out.

        spans: for each an int n (text of 1 to n tokens) or the cells of a picture's codes, exactly so many. `<eoss>`
        closes each, `<sentinel:i>` opens span i >= 1. Raises ValueError where there are more than sentinels.
        """
        if len(spans) > vocabulary.num_sentinels:
            raise ValueError(f"{len(spans)} spans, but the vocabulary has {vocabulary.num_sentinels} sentinels")
        states = _States()
        lengths = [span if isinstance(span, int) else len(span) for span in spans]
        codes_after, codes = 0, sum(len(span) for span in spans if not isinstance(span, int))
        state = END
        for number, span in reversed(list(enumerate(spans))):
            state = states.add({vocabulary.eoss: state})
            if isinstance(span, int):
                closing = dict(states.edges[state])
                for _ in range(span - 1):
                    state = states.add({"text": state, **closing})
                state = states.add({"text": state})
            else:
                codes_after += len(span)
                state = states.codes(span, state, codes - codes_after, codes)
            if number:
                state = states.add({vocabulary.sentinel_start + number: state})
        return states.grammar(vocabulary, state, sum(lengths) + 2 * len(spans) - 1)

    @classmethod
    def interleaved(cls, vocabulary: Vocabulary, cells_per_picture: int, max_tokens: int) -> "Grammar":
        """Segments of text or of a whole picture with `<break>` between, then `<eos>`; at most `max_tokens` ids.

        The prompt ends where a segment begins.
        """
        states = _States()
        begin = states.add({})
        after: dict[str | int, int] = {vocabulary.brk: begin, vocabulary.eos: END}
        text, drawn = states.add(after), states.add(after)
        states.edges[text]["text"] = text
        # The first code is written where text could begin, too.
        rest = states.codes(np.arange(1, cells_per_picture), drawn, 1, cells_per_picture)
        states.edges[begin] = {"text": text, "image": rest}
        states.cell[begin] = 0
        return states.grammar(vocabulary, begin, max_tokens)


@dataclass
class _States:
    """States of an automaton as they are written down: edges by "text", "image" or an id."""

    edges: list[dict[str | int, int]] = field(default_factory=lambda: [{}])
    cell: list[int] = field(default_factory=lambda: [NO_CELL])
    progress: list[float] = field(default_factory=lambda: [0.0])

    def add(self, edges: Mapping[str | int, int], cell: int = NO_CELL, progress: float = 0.0) -> int:
        """The number of a new state."""
        self.edges.append(dict(edges))
        self.cell.append(cell)
        self.progress.append(progress)
        return len(self.edges) - 1

    def codes(self, cells: np.ndarray, after: int, first: int = 0, total: int = 0) -> int:
        """The first of states that write codes in `cells`, numbers `first`... of `total`, and end in `after`."""
        last = max((total or len(cells)) - 1, 1)
        for number, cell in reversed(list(enumerate(np.asarray(cells).tolist(), first))):
            after = self.add({"image": after}, cell, number / last)
        return after

    def grammar(self, vocabulary: Vocabulary, start: int, max_length: int) -> Grammar:
        class_of = vocabulary.modality(np.arange(vocabulary.size))  # text 1, image 2
        specials = sorted({key for edges in self.edges for key in edges if isinstance(key, int)})
        class_of[specials] = FIRST_SPECIAL + np.arange(len(specials))
        classes: dict[str | int, int] = {"text": TEXT, "image": IMAGE}
        classes |= {id: FIRST_SPECIAL + number for number, id in enumerate(specials)}
        allow = np.zeros((len(self.edges), len(classes) + 1), dtype=bool)
        following = np.zeros(allow.shape, dtype=np.int64)
        for state, edges in enumerate(self.edges):
            for key, target in edges.items():
                allow[state, classes[key]], following[state, classes[key]] = True, target
        cell, progress = np.array(self.cell, dtype=np.int32), np.array(self.progress, dtype=np.float32)
        return Grammar(vocabulary, class_of, allow, following, cell, progress, start, max_length)


@dataclass(frozen=True)
class Automaton:
    """Several grammars as one, on a device, so that a batch of different tasks moves on without reading anything back.

    Ids are columns: id - low for low <= id < high. class_of: (U,); the others as in `Grammar`, over all states.
    always: every state but the end allows every column.
    """

    low: int
    high: int
    class_of: Tensor
    allow: Tensor
    next: Tensor
    cell: Tensor
    progress: Tensor
    needed: Tensor
    is_drawing: Tensor
    always: bool

    @classmethod
    def of(cls, grammars: Sequence[Grammar], device: torch.device) -> tuple["Automaton", Tensor]:
        """The automaton, and the (B,) int64 state in which each of `grammars` starts."""
        distinct = {id(grammar): grammar for grammar in grammars}
        class_of, columns = _common_classes(list(distinct.values()))
        num_classes = int(class_of.max()) + 1
        offsets, end = {}, 1
        allow, following = [np.zeros((1, num_classes), dtype=bool)], [np.zeros((1, num_classes), dtype=np.int64)]
        for (key, grammar), column in zip(distinct.items(), columns, strict=True):
            offsets[key] = end - 1
            states = len(grammar.allow) - 1
            for parts, source in ((allow, grammar.allow), (following, grammar.next)):
                wide = np.zeros((states, num_classes), dtype=source.dtype)
                wide[:, column] = source[1:]
                parts.append(wide)
            following[-1][following[-1] != END] += end - 1
            end += states
        allow_NC = np.concatenate(allow)
        used = np.flatnonzero(np.isin(class_of, np.argwhere(allow_NC)[:, 1]))
        low, high = int(used[0]), int(used[-1]) + 1
        class_of = class_of[low:high]

        def on_device(array: np.ndarray) -> Tensor:
            return torch.as_tensor(array, device=device)

        def joined(name: str) -> Tensor:
            parts = [getattr(grammar, name) for grammar in distinct.values()]
            return on_device(np.concatenate([parts[0][:1], *(part[1:] for part in parts)]))

        automaton = cls(
            low=low,
            high=high,
            class_of=on_device(class_of),
            allow=on_device(allow_NC),
            next=on_device(np.concatenate(following)),
            cell=joined("cell"),
            progress=joined("progress"),
            needed=joined("needed"),
            is_drawing=joined("is_drawing"),
            always=bool(allow_NC[1:, class_of].all() and (allow_NC[1:].sum(axis=1) == 1).all()),
        )
        starts = [offsets[id(grammar)] + grammar.start for grammar in grammars]
        return automaton, torch.tensor(starts, device=device)

    def allowed(self, state_B: Tensor, left_B: Tensor) -> Tensor:
        """(B, U) bool: ids after which the `left_B` tokens that a row may write reach to the end; all at the end."""
        allow_BC = self.allow[state_B] & (self.needed[self.next[state_B]] < left_B[:, None])
        return (allow_BC | (state_B == END)[:, None]).index_select(1, self.class_of)

    def step(self, state_B: Tensor, column_B: Tensor) -> tuple[Tensor, Tensor]:
        """The states after these columns, and the cells in which they stand (NO_CELL for all but image codes)."""
        class_B = self.class_of[column_B]
        cell_B = torch.where(class_B == IMAGE, self.cell[state_B], NO_CELL)
        return self.next[state_B, class_B], cell_B


def _common_classes(grammars: Sequence[Grammar]) -> tuple[np.ndarray, list[np.ndarray]]:
    """(V,) classes that fit all grammars, and for each grammar the common class of each of its classes."""
    special = np.zeros(len(grammars[0].class_of), dtype=bool)
    for grammar in grammars:
        special |= grammar.class_of >= FIRST_SPECIAL
    class_of = np.where(special, 0, np.minimum(grammars[0].class_of, IMAGE))
    class_of[special] = FIRST_SPECIAL + np.arange(special.sum())
    columns = []
    for grammar in grammars:
        column = np.arange(grammar.allow.shape[1])
        for id in np.flatnonzero(grammar.class_of >= FIRST_SPECIAL):
            column[grammar.class_of[id]] = class_of[id]
        columns.append(column)
    return class_of, columns

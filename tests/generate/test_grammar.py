"""Whatever the logits are, what is written is well-formed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.generate.drawing import draw
from mmtrain.generate.grammar import END, Automaton, Grammar
from mmtrain.generate.guidance import SamplingSettings
from mmtrain.objective import NO_CELL, picture_cells, rotate
from mmtrain.tokens import Vocabulary

V = Vocabulary(text_size=9, image_codes=7, num_sentinels=4)
GRID = 4
HUGE = 1e30


def kinds(ids: list[int]) -> str:
    """One letter per id: t text, i image, a to d sentinels, and . for <break>, / for <eoss>, ! for <eos>."""
    special = {V.brk: ".", V.eoss: "/", V.eos: "!"} | {V.sentinel_start + n: "abcd"[n] for n in range(4)}
    modality = V.modality(np.array(ids))
    return "".join("ti"[m - 1] if m else special[id] for id, m in zip(ids, modality, strict=True))


def write(grammars: list[Grammar], logits: np.random.Generator, scale: float) -> list[tuple[list[int], list[int]]]:
    """Ids and cells that the grammars let through, in one batch; the logits are random, and favor one id by far."""
    automaton, state = Automaton.of(grammars, torch.device("cpu"))
    most = torch.tensor([grammar.max_length for grammar in grammars])
    written: list[tuple[list[int], list[int]]] = [([], []) for _ in grammars]
    favorite = logits.integers(automaton.high - automaton.low)
    for step in range(int(most.max())):
        scores = torch.tensor(logits.standard_normal((len(grammars), automaton.high - automaton.low)) * scale)
        scores[:, favorite] = HUGE
        running = state != END
        scores = scores.float().masked_fill(~automaton.allowed(state, most - step), float("-inf"))
        uniform = torch.tensor(logits.random(len(grammars)))
        column = draw(scores, uniform, SamplingSettings(top_p=0.9))
        assert scores.gather(1, column[:, None]).isfinite().all()
        state, cell = automaton.step(state, column)
        for row in running.nonzero()[:, 0].tolist():
            written[row][0].append(int(column[row]) + automaton.low)
            written[row][1].append(int(cell[row]))
    assert (state == END).all()
    return written


def interleaved_parts(found: str, codes: int) -> bool:
    """Whether it is segments of text or of exactly one picture, `<break>` between, `<eos>` after the last."""
    segments = found[:-1].split(".")
    return found[-1] == "!" and all(part and (part == "i" * codes or set(part) == {"t"}) for part in segments)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.0, 1.0, 1e4, 1e30]),
    codes=st.integers(1, GRID**2),
    max_text=st.integers(1, 6),
    max_tokens=st.integers(2, 40),
    lengths=st.lists(st.one_of(st.integers(1, 4), st.integers(-4, -1)), min_size=1, max_size=4),
)
def test_a_batch_of_all_tasks_is_well_formed_for_any_logits(
    seed: int, scale: float, codes: int, max_text: int, max_tokens: int, lengths: list[int]
) -> None:
    cells = np.arange(codes) + 2
    spans = [length if length > 0 else np.arange(-length) * 3 for length in lengths]
    grammars = [
        Grammar.picture(V, cells),
        Grammar.text(V, max_text, V.eoss),
        Grammar.infill(V, spans),
        Grammar.interleaved(V, codes, max_tokens),
        Grammar.text(V, max_text, V.eos),
    ]
    written = write(grammars, np.random.default_rng(seed), scale)
    picture, caption, infill, free, text = (kinds(ids) for ids, _ in written)
    assert picture == "i" * codes
    assert written[0][1] == cells.tolist()
    for found, stop in ((caption, "/"), (text, "!")):
        assert found[-1] == stop and set(found[:-1]) == {"t"} and len(found) <= max_text + 1
    closed = infill.split("/")
    assert closed.pop() == "" and len(closed) == len(spans)
    expected_cells: list[int] = []
    for number, (found, span) in enumerate(zip(closed, spans, strict=True)):
        sentinel, content = found[: bool(number)], found[bool(number) :]
        assert sentinel == "_bcd"[number] * bool(number)
        drawn = [] if isinstance(span, int) else span.tolist()
        assert content == "i" * len(drawn) if drawn else set(content) == {"t"} and len(content) <= span
        expected_cells += [NO_CELL] * len(sentinel) + (drawn or [NO_CELL] * len(content)) + [NO_CELL]
    assert written[2][1] == expected_cells
    assert interleaved_parts(free, codes) and len(free) <= max_tokens
    assert written[3][1] == picture_cells(np.array(written[3][0]), V).tolist()


def test_a_picture_starts_only_where_it_still_fits() -> None:
    """A picture of 3 codes takes 4 tokens with its <eos>: after `t <break>` 6 are needed, and one is not enough."""
    def starts(max_tokens: int) -> set[str]:
        written = (write([Grammar.interleaved(V, 3, max_tokens)], np.random.default_rng(s), 1.0) for s in range(60))
        return {kinds(ids) for ((ids, _),) in written}

    assert not any("i" in found for found in starts(3))
    assert "iii!" in starts(4)
    assert any(found.startswith("t.iii") for found in starts(6))
    assert not any(found.startswith("t.i") for found in starts(5))


def test_masked_spans_are_laid_out_as_training_lays_them_out() -> None:
    tokens = np.array([V.eos, 6, 7, 8, V.brk, *range(V.image_start, V.image_start + 4), V.eos])
    starts, ends = np.array([2, 6]), np.array([4, 8])
    sentinels = V.sentinel_start + np.arange(2)
    rotated = rotate(tokens, starts, ends, sentinels, np.full(2, V.eoss)).tolist()
    tail = rotated[len(tokens) - 4 + 2 + 1 :]  # after `<sentinel:0>` that opens the first span
    grammar = Grammar.infill(V, [2, np.array([1, 2])])
    state = grammar.start
    for id in tail:
        assert grammar.allow[state, grammar.class_of[id]]
        state = grammar.next[state, grammar.class_of[id]]
    assert state == END and len(tail) == grammar.max_length


def test_an_end_out_of_reach_and_too_many_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="1 tokens are too few: the end takes 2"):
        Grammar.interleaved(V, 4, 1)
    with pytest.raises(ValueError, match="5 spans, but the vocabulary has 4 sentinels"):
        Grammar.infill(V, [1] * 5)

"""Token ids as a person can look at them: pieces of text, a strip of segments, a map of image codes."""

import html
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mmtrain.tokens import TokenSegment
from mmtrain.track.page import UNSAFE

LONGEST_CHARACTER = 4  # bytes, so at most so many tokens
UNREADABLE = "\ufffd"
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def pieces(ids: Sequence[int], decode: Callable[[list[int]], str]) -> Iterator[tuple[list[int], str]]:
    """Split a text at its tokens: (ids, text) pairs, in order, whose texts joined are the decoded text.

    Tokens that are parts of one character, or that add nothing, share a pair. A token is decoded after the pair
    before it: many tokenizers write a space only between two tokens.
    """
    before = read = 0
    for end in range(1, len(ids) + 1):
        known = decode(list(ids[before:read])) if read else ""
        piece = decode(list(ids[before:end]))[len(known) :]
        if end == len(ids) or (piece and _is_settled(ids, before, end, decode)):
            yield list(ids[read:end]), piece
            before, read = read, end


def _is_settled(ids: Sequence[int], before: int, end: int, decode: Callable[[list[int]], str]) -> bool:
    """Whether later tokens leave the text of ids[before:end] as it is: it does not end within a character."""
    known = decode(list(ids[before:end]))
    later = range(end + 1, min(end + LONGEST_CHARACTER, len(ids) + 1))
    return not known.endswith(UNREADABLE) or all(decode(list(ids[before:stop])).startswith(known) for stop in later)


def strip(length: int, segments: Sequence[TokenSegment], sequence_length: int) -> str:
    """The document as a bar, its segments in the color of their modality; a line at every sequence_length."""
    whole = max(length, sequence_length, 1)
    bars = "".join(
        f'<rect class="{segment.kind}" x="{segment.start}" y="0" width="{segment.length}" height="10">'
        f"<title>{segment.kind}, {span(segment)}</title></rect>"
        for segment in segments
    )
    ends = range(sequence_length, whole + 1, sequence_length)
    lines = "".join(f'<line x1="{end}" y1="-1" x2="{end}" y2="11"></line>' for end in ends)
    shape = f'viewBox="0 -1 {whole} 12" preserveAspectRatio="none" role="img" aria-label="segments of the document"'
    free = f'<rect class="free" x="0" y="0" width="{whole}" height="10"></rect>'
    return f'<svg class="strip" {shape}>{free}{bars}{lines}</svg>'


def span(segment: TokenSegment) -> str:
    """"tokens 25–88 (64)"."""
    return f"tokens {segment.start:,}–{segment.start + segment.length - 1:,} ({segment.length:,})"


def code_grid(codes: np.ndarray) -> np.ndarray:
    """(T,) codes as the square that they were read from, row by row, or as one row where T is no square."""
    side = math.isqrt(len(codes))
    return codes.reshape(side, side) if side * side == len(codes) else codes.reshape(1, -1)


def code_map(grid: np.ndarray) -> np.ndarray:
    """(G, G, 3) uint8: equal codes have equal colors, and codes that differ by one very different ones."""
    hue = np.mod(grid * GOLDEN_RATIO, 1.0)[..., None]
    light = 0.45 + 0.4 * np.mod(grid * GOLDEN_RATIO**2 * 7, 1.0)[..., None]
    wheel = np.clip(np.abs(np.mod(hue * 6 + np.array([0, 4, 2]), 6) - 3) - 1, 0, 1)
    return (255 * light * (0.35 + 0.65 * wheel)).astype(np.uint8)


def piece_attributes(ids: Sequence[int], first: int, offset: int, decode: Callable[[list[int]], str]) -> str:
    """Attributes from which the page's script draws the pieces of a text; small, where elements would be large.

    first: place of the text's first token in the document; offset: id of text token 0 in the vocabulary. The text must
    be free of secrets: a line more or less would move the ids, so that nothing is redacted here.
    """
    groups = list(pieces(ids, decode))
    numbers = " ".join("+".join(str(id + offset) for id in group) for group, _ in groups)
    lines = "\n".join(piece.replace("\r", "␍").replace("\n", "↵") for _, piece in groups)
    return f'data-first="{first}" data-ids="{numbers}" data-pieces="{html.escape(UNSAFE.sub(UNREADABLE, lines))}"'

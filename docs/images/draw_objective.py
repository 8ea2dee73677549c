"""Draws the pictures of docs/explanation/objective.md from sequences that mmtrain.objective builds.

python docs/images/draw_objective.py      (tests/objective/test_pictures.py checks that they are up to date)

Every color is readable on a light and on a dark page; there is no background.
"""

from html import escape
from pathlib import Path

import numpy as np

from mmtrain.config import ObjectiveConfig
from mmtrain.config.randomness import random_stream
from mmtrain.models import document_mask
from mmtrain.objective import TrainingSequence, training_sequences
from mmtrain.stream.batch import collate
from mmtrain.tokens import Vocabulary

WORDS = ("a", "red", "cat", "two", "dogs", "run")
VOCABULARY = Vocabulary(text_size=len(WORDS), image_codes=9, num_sentinels=4)
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<break>", "<eoss>")
COLORS = {"special": "#d0d7de", "text": "#9ecbff", "image": "#ffcf9e", "mask": "#9be3ae"}
INK, PAGE_INK = "#1b1f24", "#818b98"  # on a token; on the page, be it white or black
HEIGHT, LETTER, GAP = 26, 7.3, 3


def pair(caption: str, codes: range) -> np.ndarray:
    """The document of a caption and a picture of four codes."""
    v = VOCABULARY
    words = [v.text_start + WORDS.index(word) for word in caption.split()]
    return np.array([*words, v.brk, *(v.image_start + code for code in codes)], dtype=v.dtype)


CAT, DOGS = pair("a red cat", range(1, 5)), pair("two dogs run", range(5, 9))


def sequence(
    masked: list[str], retrieved: tuple[np.ndarray, ...] = (), query: np.ndarray = CAT, **settings: object
) -> TrainingSequence:
    """The first sequence that the objective draws, by number of its key, whose masked spans read as wanted."""
    config = ObjectiveConfig(masks="fixed", num_masks=len(masked), span_policy="segment", **settings)
    for key in range(10_000):
        (drawn,) = training_sequences(query, retrieved, VOCABULARY, config, random_stream("picture", key), 64)
        infills = " ".join(label(token) for token in drawn.tokens).rpartition("<eos>")[2]
        if infills.split() == " ".join(f"<sentinel:{i}> {span} <eoss>" for i, span in enumerate(masked)).split():
            return drawn
    raise ValueError(f"no sequence masks {masked}")


def label(token: int) -> str:
    """A word, the number of an image code, or the name of a special token."""
    v = VOCABULARY
    if token < len(SPECIALS):
        return SPECIALS[token]
    if token < v.text_end:
        return WORDS[token - v.text_start]
    return str(token - v.image_start) if token < v.image_end else f"<sentinel:{token - v.sentinel_start}>"


def color(token: int) -> str:
    """Of its kind; sentinels and `<eoss>` are of the kind that masks bring."""
    if token == VOCABULARY.eoss or token >= VOCABULARY.sentinel_start:
        return COLORS["mask"]
    return COLORS[("special", "text", "image")[int(VOCABULARY.modality(int(token)))]]


def text(x: float, y: float, content: str, fill: str = PAGE_INK, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{escape(content)}</text>'


def box(x: float, y: float, width: float, token: int) -> str:
    """A token."""
    rectangle = f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{HEIGHT}" rx="4" fill="{color(token)}"/>'
    return rectangle + text(x + width / 2, y + 17, label(token), INK)


def svg(width: float, height: float, title: str, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="ui-monospace, Menlo, Consolas, monospace" font-size="12">'
    )
    return "\n".join([head, f"<title>{escape(title)}</title>", *parts, "</svg>\n"])


def draw_sequence(title: str, drawn: TrainingSequence, with_weights: bool = False) -> str:
    """Tokens in a row; above them what is retrieved; an arc from each hole to its span; the weights below."""
    narrowest = 36 if with_weights else 0
    widths = [max(LETTER * len(label(token)) + 10, narrowest) for token in drawn.tokens]
    lefts = np.concatenate([[0], np.cumsum(np.add(widths, GAP))])
    top = 20 if drawn.is_retrieved.any() else 2
    parts = [box(x, top, w, token) for x, w, token in zip(lefts, widths, drawn.tokens.tolist(), strict=False)]
    runs = np.flatnonzero(np.diff(np.concatenate([[0], drawn.is_retrieved, [0]])))
    for start, end in zip(runs[::2], runs[1::2], strict=True):
        x, right = lefts[start], lefts[end] - GAP
        parts.append(f'<path d="M{x:.1f} {top - 4}H{right:.1f}" stroke="{PAGE_INK}" stroke-width="2"/>')
        parts.append(text((x + right) / 2, top - 8, "retrieved"))
    bottom = top + HEIGHT
    for number in range(drawn.num_masks):
        hole, infill = np.flatnonzero(drawn.tokens == VOCABULARY.sentinel_start + number)
        x, to = (lefts[i] + widths[i] / 2 for i in (hole, infill))
        low = bottom + 22
        curve = f"M{x:.1f} {bottom + 1}C{x:.1f} {low} {to:.1f} {low} {to:.1f} {bottom + 3}"
        parts.append(f'<path d="{curve}" fill="none" stroke="{PAGE_INK}" stroke-width="1.5"/>')
        tip = f"M{to - 4:.1f} {bottom + 8}L{to:.1f} {bottom + 1}L{to + 4:.1f} {bottom + 8}Z"
        parts.append(f'<path d="{tip}" fill="{PAGE_INK}"/>')
    bottom += 20 if drawn.num_masks else 2
    if with_weights:
        for x, width, weight in zip(lefts[1:], widths[1:], drawn.loss_weight, strict=False):
            tall = 30 * weight
            place = f'x="{x:.1f}" y="{bottom + 32 - tall:.1f}" width="{width:.1f}" height="{tall:.1f}"'
            parts.append(f'<rect {place} fill="#8b949e"/>')
            parts.append(text(x + width / 2, bottom + 46, f"{weight:g}" if weight else "0"))
        bottom += 50
    return svg(lefts[-1], bottom, title, parts)


def draw_row(title: str, sequences: list[TrainingSequence], length: int) -> str:
    """A packed row from left to right and from top to bottom, and who looks at whom."""
    batch, _ = collate([sequences], [[0] * len(sequences)], 1, length, VOCABULARY)
    tokens, mask, document = batch["tokens"][0].tolist(), document_mask(batch["document"])[0, 0], batch["document"][0]
    cell, left = 15, LETTER * len("<sentinel:0>") + 8
    parts = []
    for i, token in enumerate(tokens):
        fill = color(token)
        parts.append(text(left - 6, 8 + cell * i + 12, label(token), anchor="end"))
        for j, seen in enumerate(mask[i].tolist()):
            empty = f'fill="none" stroke="{PAGE_INK}" stroke-opacity="0.25"'
            look = f'fill="{fill}"' if seen and document[i] >= 0 else empty
            place = f'x="{left + cell * j:.1f}" y="{8 + cell * i}" width="{cell - 2}" height="{cell - 2}"'
            parts.append(f"<rect {place} {look}/>")
    size = cell * len(tokens)
    return svg(left + size + 2, size + 12, title, parts)


def pictures() -> dict[str, str]:
    """SVG by file name."""
    plain, caption = sequence([]), sequence(["a red cat"], whole_segment_probability=1.0)
    weights = {"sentinel_loss_weight": 0.0, "retrieved_loss_weight": 0.1, "image_loss_weight": 0.5}
    spans = {"whole_segment_probability": 0.0}
    return {
        "objective-plain.svg": draw_sequence("A pair without a mask", plain),
        "objective-span.svg": draw_sequence("A span of the caption masked", sequence(["red cat"], **spans)),
        "objective-caption.svg": draw_sequence("The whole caption masked", caption),
        "objective-two.svg": draw_sequence("Two masks", sequence(["red", "2 3"], **spans)),
        "objective-retrieved.svg": draw_sequence("A retrieved document in front", sequence([], (DOGS,))),
        "objective-weights.svg": draw_sequence(
            "Loss weights", sequence(["red"], (pair("two dogs", range(5, 7)),), **spans, **weights), True
        ),
        "objective-row.svg": draw_row("A packed row", [plain, sequence(["dogs"], query=DOGS[:3], **spans)], 20),
    }


if __name__ == "__main__":
    for name, picture in pictures().items():
        (Path(__file__).parent / name).write_text(picture)

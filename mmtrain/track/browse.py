"""browse.html: documents of a corpus as they are stored, as tokens, and as the tokens give them back, in one file."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmtrain.config import write_text_atomic
from mmtrain.documents import BadImage, Document, Image, decode_square
from mmtrain.tokens import MODALITIES, ImageTokenizer, TextTokenizer, TokenSegment, Vocabulary
from mmtrain.tokens.quality import psnr
from mmtrain.track import page
from mmtrain.track.page import key_text, text, value_text
from mmtrain.track.secrets import redact_text
from mmtrain.track.statistics import EOS_TOKENS, cluster_of, kind_of
from mmtrain.track.thumbnails import image_element, thumbnail
from mmtrain.track.token_view import code_grid, code_map, piece_attributes, span, strip

LONGEST_SEGMENT = 40_000  # characters of one text that the page shows
MOST_PIECES = 12_000  # tokens of one text that the page shows
SEGMENTS_AT_ONCE = 10  # of a document; the others wait behind a click
DETAILED_PICTURES = 12  # of a document, with reconstruction and codes
PICTURE_BYTES = 5_500_000  # of all pictures of a page together, before base64
LEAST_ALLOWANCE, MOST_ALLOWANCE = 1_200, 40_000  # bytes of one picture
SIDE = 192  # CSS pixels of a picture beside its reconstruction
SMALL_SIDE = 96

STYLE = (Path(__file__).parent / "browse.css").read_text(encoding="utf-8")
SCRIPT = (Path(__file__).parent / "browse.js").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Shown:
    """A document of the page.

    tokens: (n,) ids, None where there are none yet. cluster_size: documents in its near-duplicate cluster, None
    without clusters. neighbours: the nearest first, with their scores; None without retrieval.
    """

    document: Document
    split: str
    tokens: np.ndarray | None = None
    segments: Sequence[TokenSegment] = ()
    cluster_size: int | None = None
    neighbours: Sequence[tuple[Document, float]] | None = None


@dataclass(frozen=True)
class BrowseData:
    """What the page is made of. num_pictures: in all of `documents`, about; it decides how large each may be."""

    title: str
    subtitle: str
    documents: Iterable[Shown]
    num_pictures: int
    text: TextTokenizer
    image: ImageTokenizer
    vocabulary: Vocabulary
    sequence_length: int
    facts: Sequence[tuple[str, Any]] = ()

    @property
    def allowance(self) -> int:
        """Most bytes of one picture; about every second one has a reconstruction and a map of codes beside it."""
        return min(max(PICTURE_BYTES // max(2 * self.num_pictures, 1), LEAST_ALLOWANCE), MOST_ALLOWANCE)


def write_browse(path: Path, data: BrowseData) -> Path:
    """Write the page, atomically, and return its path. It refers to nothing outside itself."""
    cards = [_card(number, shown, data) for number, shown in enumerate(data.documents, start=1)]
    facts = "".join(
        f'<div class="fact"><span class="label">{key_text(key)}</span><b>{value_text(str(key), value)}</b></div>'
        for key, value in data.facts
    )
    body = (
        f'<header><h1>{text(data.title, 120)}</h1><p class="soft">{text(data.subtitle, 400)}</p>'
        f'<div class="facts">{facts}</div></header>\n{TOOLBAR}\n<main id="documents">{"".join(cards)}</main>\n'
        '<p class="soft" id="nothing" hidden>No document passes the filters.</p>'
        f'<footer class="soft">{LEGEND}</footer>'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, page.page(data.title, body, STYLE, SCRIPT))
    return path


TOOLBAR = """<form class="toolbar" id="toolbar" autocomplete="off">
<input id="search" type="search" placeholder="Search text, id, source" aria-label="Search">
<select id="kind" aria-label="Modality"><option value="">all kinds</option><option>mixed</option>
<option>text only</option><option>picture only</option></select>
<select id="split" aria-label="Split"><option value="">all splits</option></select>
<select id="order" aria-label="Order"><option value="">as sampled</option><option value="tokens">longest first</option>
<option value="pictures">most pictures first</option></select>
<label><input id="pieces" type="checkbox"> tokens</label>
<button type="button" id="fold">fold all</button>
<span class="moves"><button type="button" id="previous" aria-label="Previous document">‹</button>
<output id="count"></output><button type="button" id="next" aria-label="Next document">›</button></span>
</form>"""

LEGEND = (
    "Keys: <kbd>j</kbd> and <kbd>k</kbd> next and previous document, <kbd>/</kbd> search, <kbd>t</kbd> tokens, "
    "<kbd>f</kbd> fold all. The strip shows a document's segments, "
    '<span class="key text">text</span> and <span class="key image">pictures</span>, '
    "a <code>&lt;break&gt;</code> between two of them, and a line at every multiple of the sequence length. "
    "In the token view a block is one token, or several that only together are a character; point at it for its id. "
    "Beside a reconstruction stands its PSNR; in the map of codes, equal colors are equal codes. Pictures are scaled "
    "down for this page, and what looks like a secret is shown as [redacted]: <code>mmtrain data inspect ID</code> "
    "shows a document as it is."
)


def _card(number: int, shown: Shown, data: BrowseData) -> str:
    """One document."""
    document = shown.document
    kind = kind_of(len(document.texts), len(document.images))
    length = 0 if shown.tokens is None else len(shown.tokens)
    blocks = _blocks(shown, data)
    if len(blocks) > SEGMENTS_AT_ONCE + 2:
        left = len(blocks) - SEGMENTS_AT_ONCE
        rest = "".join(blocks[SEGMENTS_AT_ONCE:])
        folded = f'<details class="rest"><summary>{left} more segments</summary>{rest}</details>'
        blocks = [*blocks[:SEGMENTS_AT_ONCE], folded]
    bar = "" if shown.tokens is None else strip(length, shown.segments, data.sequence_length)
    meta = json.dumps(document.meta, ensure_ascii=False, indent=1)
    return (
        f'<article class="card" id="d{number}" data-kind="{kind}" data-split="{text(shown.split)}" '
        f'data-tokens="{length}" data-pictures="{len(document.images)}" tabindex="-1"><details class="document" open>'
        f'<summary><h2>{text(document.id)}</h2><span class="chips">{_chips(shown, kind, data)}</span>{bar}</summary>'
        f'{"".join(blocks)}{_neighbours(shown, data)}'
        f'<details class="meta"><summary>meta</summary><pre>{text(meta, 4000)}</pre></details></details></article>\n'
    )


def _chips(shown: Shown, kind: str, data: BrowseData) -> str:
    document = shown.document
    number = len(document.images)
    chips = [shown.split, f"source {document.source}", kind, f"{number} picture{'' if number == 1 else 's'}"]
    if shown.tokens is not None:
        capacity = data.sequence_length - EOS_TOKENS
        windows = -(-len(shown.tokens) // capacity)
        fit = "fits" if windows <= 1 else f"{len(shown.tokens) / capacity:.1f} times what fits"
        chips.append(f"{len(shown.tokens):,} tokens, {fit} in {data.sequence_length:,}")
    cluster = cluster_of(document.meta)
    if cluster is not None and shown.cluster_size is not None:
        alone = "alone in its cluster" if shown.cluster_size == 1 else f"1 of {shown.cluster_size:,} in its cluster"
        chips.append(f"{alone} ({cluster})")
    return "".join(f'<span class="chip">{text(chip, 200)}</span>' for chip in chips)


def _blocks(shown: Shown, data: BrowseData) -> list[str]:
    """The segments of a document in reading order, each with its tokens where they are known."""
    document = shown.document
    local = [data.text.encode(segment) if isinstance(segment, str) else None for segment in document.segments]
    queues = {kind: [s for s in shown.segments if s.kind == kind] for kind in ("text", "image")}
    expected = {"text": sum(bool(ids) for ids in local), "image": len(document.images)}
    fit = {kind: len(found) for kind, found in queues.items()} == expected
    blocks = []
    if shown.tokens is None or not fit or not all(_is_whole(s, shown.tokens, data.vocabulary) for s in shown.segments):
        missing = "There are no tokens of this document."
        differ = "The stored tokens have other segments than this document: they belong to another state of the corpus."
        blocks.append(f'<p class="warning">{missing if shown.tokens is None else differ}</p>')
        queues = {"text": [], "image": []}
    texts, images = iter(queues["text"]), iter(queues["image"])
    details = _reconstructions(shown, queues["image"][:DETAILED_PICTURES], data)
    for segment, ids in zip(document.segments, local, strict=True):
        if isinstance(segment, str):
            blocks.append(_text_block(segment, ids or [], next(texts, None) if ids else None, shown, data))
        else:
            blocks.append(_picture_block(segment, next(images, None), next(details, None), data))
    return blocks


def _is_whole(segment: TokenSegment, tokens: np.ndarray, vocabulary: Vocabulary) -> bool:
    """Whether all ids of a segment are there and of its kind."""
    part = tokens[segment.start : segment.start + segment.length]
    return len(part) == segment.length and bool((vocabulary.modality(part) == MODALITIES.index(segment.kind)).all())


def _text_block(
    words: str, expected: Sequence[int], segment: TokenSegment | None, shown: Shown, data: BrowseData
) -> str:
    """A text; its tokens are drawn by the page's script when they are asked for."""
    label, hidden, note = f"text, {len(words):,} characters", "", ""
    if segment is not None and shown.tokens is not None:
        ids = shown.tokens[segment.start : segment.start + segment.length].astype(np.int64) - data.vocabulary.text_start
        label += f", {span(segment)}"
        decoded = data.text.decode(ids.tolist())
        if ids.tolist() != list(expected):
            note = '<p class="warning">The text tokenizer gives other tokens for this text than are stored.</p>'
        elif decoded != words:
            other = f'<div class="words" dir="auto">{text(decoded, LONGEST_SEGMENT)}</div>'
            note = f'<p class="warning">The tokens decode to another text:</p>{other}'
        if redact_text(decoded) == decoded:  # a secret in pieces would pass unseen
            kept = ids[:MOST_PIECES].tolist()
            attributes = piece_attributes(kept, segment.start, data.vocabulary.text_start, data.text.decode)
            more = f'<p class="soft">{len(ids) - len(kept):,} more tokens</p>' if len(kept) < len(ids) else ""
            hidden = f'<div class="pieces" dir="auto" {attributes}></div>{more}'
    return (
        f'<section class="segment text"><div class="label">{label}</div>'
        f'<div class="words" dir="auto">{text(words, LONGEST_SEGMENT)}</div>{hidden}{note}</section>'
    )


def _picture_block(image: Image, segment: TokenSegment | None, detail: str | None, data: BrowseData) -> str:
    """A picture beside what its tokens give back."""
    label = f"picture, {image.width} × {image.height} {image.extension}, {len(image.data) / 1e3:,.1f} kB"
    label += f", {span(segment)}" if segment else ""
    original = thumbnail(image, data.allowance, SIDE, "picture of the corpus")
    return (
        f'<section class="segment image"><div class="label" title="sha256 {text(image.sha256)}">{text(label)}</div>'
        f'<div class="row"><figure>{original}<figcaption>as stored</figcaption></figure>{detail or ""}</div></section>'
    )


def _reconstructions(shown: Shown, segments: Sequence[TokenSegment], data: BrowseData) -> Iterator[str]:
    """Figures of the pictures that the codes of `segments` decode to, and of the codes."""
    if shown.tokens is None or any(s.length != data.image.tokens_per_image for s in segments) or not segments:
        return iter(())
    start = data.vocabulary.image_start
    codes = np.stack([shown.tokens[s.start : s.start + s.length].astype(np.int64) - start for s in segments])
    decoded = data.image.decode(codes)
    pairs = zip(shown.document.images, codes, decoded, strict=False)
    return iter([_detail(image, row, pixels, data) for image, row, pixels in pairs])


def _detail(image: Image, codes: np.ndarray, pixels: np.ndarray, data: BrowseData) -> str:
    try:
        truth = decode_square(image.data, data.image.image_size)
        quality = f", {psnr(truth[None], pixels[None])[0]:.1f} dB"
    except BadImage:
        quality = ""
    back = image_element(pixels, data.allowance, SIDE, "picture from the tokens")
    grid = code_grid(codes)
    rows = "\n".join(" ".join(map(str, row)) for row in grid.tolist())
    shown = image_element(code_map(grid), MOST_ALLOWANCE, SIDE, "map of the codes").replace("<img", "<img data-map", 1)
    return (
        f"<figure>{back}<figcaption>from tokens{quality}</figcaption></figure>"
        f'<figure class="codes">{shown}<figcaption><span class="code">{len(np.unique(codes))} of {len(codes)} codes '
        f"differ</span><details><summary>codes</summary><pre>{rows}</pre></details></figcaption></figure>"
    )


def _neighbours(shown: Shown, data: BrowseData) -> str:
    """The documents that retrieval would place in front of this one."""
    if shown.neighbours is None:
        return ""
    cards = "".join(
        f'<figure>{_first_picture(document, data)}<figcaption dir="auto"><b>{score:.3f}</b> {_same(shown, document)}'
        f"<code>{text(document.id)}</code><br>{text(' '.join(document.texts), 200)}</figcaption></figure>"
        for document, score in shown.neighbours
    )
    inside = f'<div class="row small">{cards}</div>' if cards else '<p class="soft">none passed the filters</p>'
    return f'<details class="neighbours" open><summary>nearest neighbors</summary>{inside}</details>'


def _first_picture(document: Document, data: BrowseData) -> str:
    if not document.images:
        return '<span class="soft">(text only)</span>'
    return thumbnail(document.images[0], min(data.allowance, 6_000), SMALL_SIDE, "picture of the neighbor")


def _same(shown: Shown, document: Document) -> str:
    """A warning where a near-duplicate came through as a neighbour."""
    own = cluster_of(shown.document.meta)
    same = own is not None and own == cluster_of(document.meta)
    return '<span class="warning">same cluster</span> ' if same else ""

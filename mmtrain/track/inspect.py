"""retrieval.html: documents with what a search found for them, and why some of it is not retrieved, in one file."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmtrain.config import write_text_atomic
from mmtrain.documents import Document
from mmtrain.track import page
from mmtrain.track.page import key_text, text, value_text
from mmtrain.track.thumbnails import thumbnail

QUERY_SIDE, HIT_SIDE = 160, 112
PICTURE_BYTES = 6_000
STYLE = """
.hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); gap: 14px; margin-top: 8px; }
.hits figure.out { opacity: 0.45; }
.hits figure.out b { color: var(--mark); }
.query { display: flex; gap: 18px; align-items: flex-start; }
.query > div { flex: 1; min-width: 0; }
"""


@dataclass(frozen=True)
class FoundWindow:
    """A window of the memory that a search found. reason: why it is not retrieved, "" for a candidate."""

    document: Document
    score: float
    reason: str


@dataclass(frozen=True)
class Inspected:
    """A query document with what each kind of query found, best first, by the name of the kind."""

    document: Document
    found: Mapping[str, Sequence[FoundWindow]]


def write_inspect(path: Path, title: str, rows: Iterable[Inspected], facts: Mapping[str, object]) -> Path:
    """Write the page, atomically, and return its path. It refers to nothing outside itself and runs no script."""
    cards = "".join(_card(row) for row in rows)
    boxes = "".join(
        f'<div class="fact"><span class="label">{key_text(key)}</span><b>{value_text(key, value)}</b></div>'
        for key, value in facts.items()
    )
    body = (
        f'<header><h1>{text(title, 120)}</h1><p class="soft">Each document with the nearest windows of the memory, by '
        "its text and by its pictures, with their cosines. Training draws among the candidates; what is pale was "
        f'passed over, and says why.</p><div class="facts">{boxes}</div></header>{cards}'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, page.page(title, body, STYLE))
    return path


def _card(row: Inspected) -> str:
    channels = "".join(_channel(name, found) for name, found in row.found.items())
    return (
        f'<article class="card"><div class="query"><figure>{_pictures(row.document, QUERY_SIDE)}</figure><div>'
        f"<code>{text(row.document.id)}</code><p>{text(' '.join(row.document.texts), 400)}</p></div></div>"
        f"{channels}</article>"
    )


def _channel(name: str, found: Sequence[FoundWindow]) -> str:
    figures = "".join(_figure(window) for window in found)
    inside = f'<div class="hits">{figures}</div>' if figures else '<p class="soft">nothing to search by</p>'
    return f"<h3>by its {text(name)}</h3>{inside}"


def _figure(window: FoundWindow) -> str:
    reason = f"<b>{text(window.reason.replace('_', ' '))}</b><br>" if window.reason else ""
    return (
        f'<figure{" class=out" if window.reason else ""}>{_pictures(window.document, HIT_SIDE)}'
        f'<figcaption dir="auto">{reason}<b>{window.score:.3f}</b> {text(" ".join(window.document.texts), 120)}'
        "</figcaption></figure>"
    )


def _pictures(document: Document, side: int) -> str:
    if not document.images:
        return '<span class="soft">(text only)</span>'
    return thumbnail(document.images[0], PICTURE_BYTES, side, " ".join(document.texts))

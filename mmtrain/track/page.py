"""Pieces of a safe, self-contained HTML page: text, numbers, tables and pictures from untrusted values.

Captions, names and prompts may come from strangers. Text is cleaned and escaped, pictures are decoded and
encoded again, and the page's content security policy forbids scripts and anything from outside.
"""

import base64
import hashlib
import html
import io
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from mmtrain.track.secrets import redact_text

LONGEST_TEXT = 600
MOST_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP")

# Control characters, lone surrogates and bidirectional overrides: invisible, and able to reorder what follows.
UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

STYLE = """
:root { color-scheme: light dark; --ink: #1d2125; --soft: #656d76; --line: #dfe3e8; --paper: #ffffff;
  --card: #f6f7f9; --accent: #2f6f9f; --mark: #b3262e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #98a2ad; --line: #343b43; --paper: #15181c;
  --card: #1e2328; --accent: #74b3e0; --mark: #f0838a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 40px 28px 80px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif; }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.015em; }
h2 { font-size: 1.35rem; margin: 56px 0 14px; padding-bottom: 8px; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 26px 0 8px; }
p { margin: 8px 0 14px; max-width: 90ch; }
.soft, figcaption, .label { color: var(--soft); font-size: 0.86rem; }
table { border-collapse: collapse; font-size: 0.92rem; width: 100%; }
.scroll { overflow-x: auto; }
th, td { text-align: left; padding: 6px 18px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
th { font-weight: 600; color: var(--soft); white-space: nowrap; }
.pairs th { width: 1%; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.own td { color: var(--mark); font-weight: 650; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 12px; margin: 22px 0; }
.fact { background: var(--card); border-radius: 10px; padding: 12px 16px; overflow-wrap: anywhere; }
.fact b { display: block; font-size: 1.2rem; font-weight: 650; line-height: 1.3; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 16px; }
.card { background: var(--card); border-radius: 12px; padding: 14px 16px; margin: 0 0 16px; overflow-wrap: anywhere; }
.cards .card { margin: 0; }
.row { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start; margin-top: 10px; }
.row figure { width: 192px; }
.row.small figure { width: 150px; }
figure { margin: 0; }
figcaption { margin-top: 4px; line-height: 1.35; overflow-wrap: anywhere; }
figure.truth img { outline: 3px solid var(--accent); outline-offset: 2px; }
figure.truth figcaption { margin-top: 9px; }
figure.truth b { color: var(--accent); }
img { display: block; border-radius: 4px; max-width: 100%; height: auto; }
img.pixels { image-rendering: pixelated; }
img.plot { width: 100%; background: #fff; border-radius: 10px; padding: 8px; border: 1px solid var(--line); }
.bar { height: 8px; border-radius: 4px; background: var(--accent); min-width: 1px; }
td.share { width: 42%; vertical-align: middle; }
pre { background: var(--card); border-radius: 10px; padding: 14px 16px; overflow-x: auto; font-size: 0.88rem;
  line-height: 1.6; font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
nav { margin: 18px 0 0; font-size: 0.92rem; display: flex; flex-wrap: wrap; gap: 4px 16px; }
nav a { color: var(--accent); text-decoration: none; white-space: nowrap; }
@media print { body { max-width: none; } h2, .card, tr { break-inside: avoid; } }
"""


def clean(value: Any, longest: int = LONGEST_TEXT) -> str:
    """`value` as plain text: no secrets, no invisible or reordering characters, at most `longest` characters."""
    whole = str(value)
    shown = UNSAFE.sub("\ufffd", redact_text(whole[: 4 * longest]))
    if len(shown) > longest or len(whole) > 4 * longest:
        return f"{shown[:longest]}… ({len(whole):,} characters)"
    return shown


def text(value: Any, longest: int = LONGEST_TEXT) -> str:
    """`value` cleaned and escaped, for element content and quoted attributes."""
    return html.escape(clean(value, longest), quote=True)


def scientific(number: float) -> str:
    """3172000000000000 -> "3.17e15"; integers of any size."""
    if number == 0:
        return "0"
    mantissa, exponent = f"{float(number):.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def large(number: float) -> str:
    """1234567 -> "1.23 M"; 1e13 and beyond in scientific notation."""
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if abs(number) >= size * 0.9995:
            return scientific(number) if number >= 1e15 else f"{number / size:.3g}{letter}"
    return f"{number:,.0f}" if abs(number) >= 1000 or number == int(number) else f"{number:.4g}"


def value_text(key: str, value: Any) -> str:
    """A value in the form that a person reads, escaped; `key` tells FLOPs, fractions and bytes apart."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        if "flops" in key.lower():
            return f"{scientific(value)} FLOPs"
        return large(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(value_text(key, item) for item in value)
    if isinstance(value, dict):
        return "; ".join(f"{text(inner)}: {value_text(str(inner), item)}" for inner, item in value.items())
    return text(value)


def key_text(key: Any) -> str:
    """A key as a label: underscores become spaces."""
    return html.escape(clean(key, 120).replace("_", " "))


def pairs_table(pairs: Iterable[tuple[Any, Any]]) -> str:
    """Two columns: label and value."""
    rows = "".join(f"<tr><th>{key_text(key)}</th><td>{value_text(str(key), value)}</td></tr>" for key, value in pairs)
    return f'<div class="scroll pairs"><table>{rows}</table></div>'


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], columns: Sequence[str] = (), marked: Sequence[int] = ()
) -> str:
    """A table of cells that are HTML already.

    columns: CSS class of each column ("", "number", "share"); marked: rows that stand out.
    """

    def line(tag: str, cells: Sequence[str], own: bool = False) -> str:
        kinds = [*columns, *[""] * (len(cells) - len(columns))]
        inner = "".join(f'<{tag} class="{kind}">{cell}</{tag}>' for kind, cell in zip(kinds, cells, strict=True))
        return f'<tr class="own">{inner}</tr>' if own else f"<tr>{inner}</tr>"

    body = "".join(line("td", cells, index in marked) for index, cells in enumerate(rows))
    return f'<div class="scroll"><table>{line("th", header)}{body}</table></div>'


def data_uri(picture: bytes, largest_side: int) -> tuple[str, int, int]:
    """Decode `picture` and encode it as PNG again: (data: URI, width, height), shrunk to `largest_side`.

    Raises ValueError when it is no PNG, JPEG or WEBP picture, damaged, or larger than MOST_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is the stricter one
            with Image.open(io.BytesIO(picture), formats=FORMATS) as opened:
                if opened.width * opened.height > MOST_PIXELS:
                    raise ValueError(f"{opened.width}x{opened.height} pixels are too many")
                pixels = _on_white(opened)
    except ValueError:
        raise
    except Exception as error:  # Pillow raises many types on damaged files
        raise ValueError(f"unreadable picture: {type(error).__name__}") from error
    pixels.thumbnail((largest_side, largest_side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    pixels.save(out, format="PNG", optimize=True)
    encoded = base64.b64encode(out.getvalue()).decode("ascii")
    return f"data:image/png;base64,{encoded}", pixels.width, pixels.height


def _on_white(picture: Image.Image) -> Image.Image:
    rgba = picture.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    return white.convert("RGB")


def picture(data: bytes, alt: str, side: int = 192) -> str:
    """An <img> about `side` pixels wide; small pictures grow by a whole factor and keep their pixels sharp."""
    try:
        uri, width, height = data_uri(data, 2 * side)
    except ValueError as error:
        return f'<span class="soft">[{text(error)}]</span>'
    factor = max(1, round(side / max(width, height)))
    scale = factor if factor > 1 else min(1.0, side / max(width, height))
    shown = f'width="{round(width * scale)}" height="{round(height * scale)}"'
    kind = ' class="pixels"' if factor > 1 else ""
    return f'<img{kind} src="{uri}" {shown} alt="{text(alt, 200)}">'


def plot(data: bytes, alt: str, pixelated: bool = False) -> str:
    """A picture over the whole width of the page."""
    try:
        uri, _, _ = data_uri(data, 2400)
    except ValueError as error:
        return f'<p class="soft">[{text(error)}]</p>'
    return f'<img class="plot{" pixels" if pixelated else ""}" src="{uri}" alt="{text(alt, 200)}">'


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """The whole document. `body` is HTML made by the functions of this file.

    style: CSS after that of all pages. script: JavaScript of ours, the only one that the policy lets run.
    """
    policy, code = POLICY, ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy, code = f"{POLICY}; script-src 'sha256-{digest}'", f"<script>{script}</script>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{text(title, 120)}</title><style>{STYLE}{style}</style></head>\n<body>\n{body}\n{code}</body></html>\n"
    )

"""One HTML page: from markup to texts and pictures in reading order.

After the DOM simplification of OBELICS (Laurençon et al. 2023): what only styles a text flows into it,
what makes a paragraph ends it, and what is no content of the page (scripts, navigation, what is hidden) goes.
"""

import codecs
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from selectolax.lexbor import LexborHTMLParser, LexborNode

# These begin and end a text (HTML standard, "Rendering": blocks, list items, parts of tables); others flow.
BLOCKS = frozenset(
    (
        "address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "dialog", "dir",
        "div", "dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "frameset", "h1", "h2", "h3", "h4",
        "h5", "h6", "header", "hgroup", "hr", "html", "legend", "li", "listing", "main", "menu", "nav", "ol",
        "optgroup", "option", "p", "plaintext", "pre", "search", "section", "summary", "table", "tbody", "td", "tfoot",
        "th", "thead", "tr", "ul", "xmp",
    )
)
PREFORMATTED = frozenset(("listing", "plaintext", "pre", "xmp"))
NO_CONTENT = frozenset(("script", "style", "template", "noframes"))
EMBEDDED = frozenset(("applet", "audio", "canvas", "embed", "iframe", "object", "svg", "video"))
# Inside these a header or footer belongs to the part; elsewhere it is that of the site (HTML-AAM 1.0).
SECTIONS = frozenset(("article", "aside", "main", "section"))
NAVIGATION_ROLES = frozenset(("banner", "contentinfo", "doc-toc", "navigation", "search"))
NAVIGATION_CLASSES = frozenset(("navfooter", "navheader", "toc"))  # of the DocBook XSL stylesheets
HIDING_STYLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
# HTML's white space, and the space that only forbids a line break.
WHITE_SPACE = re.compile(r"[ \t\n\f\r\xa0]+")

NAVIGATION = "navigation element"
HIDDEN = "hidden element"
EMBEDDED_ELEMENT = "embedded element (drawing, frame, object, sound or video)"

BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
# Codecs of Python that are no encodings of pages; some take quadratic time.
NO_PAGE_ENCODINGS = frozenset(("idna", "punycode", "raw_unicode_escape", "undefined", "unicode_escape", "utf-7"))
# What a declared encoding means to browsers: the larger one that holds it (WHATWG Encoding standard).
MEANT_ENCODINGS = {
    "ascii": "cp1252",
    "euc_kr": "cp949",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "shift_jis": "cp932",
}
DECLARED_ENCODING = re.compile(
    rb"""<\?xml[^>]{0,200}?\sencoding\s*=\s*["']([\w.:-]+)|<meta\s[^>]{0,400}?charset\s*=\s*["']?\s*([\w.:-]+)""",
    re.IGNORECASE,
)
DECLARATION_BYTES = 4096

XHTML_NAMESPACE = "http://www.w3.org/1999/xhtml"
# For an HTML parser the rest of the page is inside of <script src="a.js"/>, which is how XML writes it.
EMPTY_RAW_TEXT = re.compile(r"<(iframe|script|style|textarea|title)\b([^<>]*)/>", re.IGNORECASE)

# No branch can fail after its first characters, or a page of unclosed tags would take quadratic time.
TAG = re.compile(
    r"""<!--.*?(?:-->|\Z)|<(/?)([a-z][^\s/>]*+)(?:[^>"']++|"[^"]*+(?:"|\Z)|'[^']*+(?:'|\Z))*+""",
    re.IGNORECASE | re.DOTALL,
)
# Void elements, and those that another of their kind ends: any number of them may stay open.
NOT_NESTED = frozenset(
    (
        "!doctype", "a", "area", "base", "body", "br", "button", "col", "dd", "dt", "embed", "head", "hr", "html",
        "img", "input", "li", "link", "meta", "nobr", "option", "p", "param", "source", "tbody", "td", "tfoot", "th",
        "thead", "tr", "track", "wbr",
    )
)
# The parser opens them again in every paragraph (HTML standard, "reconstruct the active formatting elements").
FORMATTING = frozenset(("b", "big", "code", "em", "font", "i", "s", "small", "strike", "strong", "tt", "u"))
FORMATTING_COST = 20
TAG_COST = 16  # of a node itself
# The parser then takes less than about a gigabyte and some seconds; honest pages of 20 MB stay below.
LARGEST_PARSING_COST = 50_000_000


class Reference(NamedTuple):
    """The place of a picture. src: as in the page, without white space around it."""

    src: str


def decode_page(data: bytes) -> tuple[str, bool]:
    """The text of a page, and whether every byte of it fitted the encoding (others become U+FFFD).

    A byte order mark decides, then an XML declaration or a <meta charset>, then UTF-8. A declared UTF-16 without its
    mark is UTF-8, or the declaration could not have been read.
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return _decode(data[len(mark) :], encoding)
    declared = DECLARED_ENCODING.search(data[:DECLARATION_BYTES])
    if declared is None:
        return _decode(data, "utf-8")
    try:
        encoding = codecs.lookup((declared[1] or declared[2]).decode("ascii", "replace")).name
        if encoding in NO_PAGE_ENCODINGS or encoding.startswith(("utf-16", "utf-32")):
            encoding = "utf-8"
        return _decode(data, MEANT_ENCODINGS.get(encoding, encoding))
    except LookupError:  # unknown, or no text encoding ("zip")
        return _decode(data, "utf-8")


def _decode(data: bytes, encoding: str) -> tuple[str, bool]:
    try:
        return data.decode(encoding), True
    except UnicodeDecodeError:
        return data.decode(encoding, "replace"), False


def is_too_complex(text: str) -> bool:
    """Whether a parser that follows the standard could take very long or very much memory for this page.

    Its work per tag grows with the number of elements that are open, and for an <option> with the number of those
    before. Both are estimated from the tags alone.
    """
    cost = depth = 0
    num_open: Counter[str] = Counter()
    for tag in TAG.finditer(text):
        name = tag[2].lower() if tag[2] else "!doctype"
        own_cost = FORMATTING_COST if name in FORMATTING else 1
        if tag[1]:
            if num_open[name] and name not in NOT_NESTED:
                num_open[name] -= 1
                depth -= own_cost
            continue
        num_open[name] += 1
        if name not in NOT_NESTED:
            depth += own_cost
        cost += TAG_COST + depth + (num_open[name] if name == "option" else 0)
        if cost > LARGEST_PARSING_COST:
            return True
    return False


class _Context(NamedTuple):
    """What the ancestors of a node say about it. left_out: why all of it is, or ""."""

    is_preformatted: bool = False
    in_section: bool = False
    left_out: str = ""


class Page:
    """A parsed page. title: that of its head, "" without one."""

    def __init__(self, text: str) -> None:
        if XHTML_NAMESPACE in text[:DECLARATION_BYTES]:
            text = EMPTY_RAW_TEXT.sub(r"<\1\2></\1>", text)
        self._parser = LexborHTMLParser(text)  # it owns the nodes
        self._head = list(self._parser.head.iter()) if self._parser.head else []
        titles = [node.text() for node in self._head if node.tag == "title"]
        self.title = WHITE_SPACE.sub(" ", titles[0]).strip() if titles else ""

    @property
    def is_frameset(self) -> bool:
        """Whether the page only arranges other pages."""
        return self._parser.body is None

    @property
    def is_redirect(self) -> bool:
        """Whether the page sends every reader to another one (in <noscript> only those without scripts)."""
        metas = [node.attributes for node in self._head if node.tag == "meta"]
        return any(
            (meta.get("http-equiv") or "").lower() == "refresh" and ";" in (meta.get("content") or "")
            for meta in metas
        )

    def parts(self, accepts: Callable[[str], bool], skip: Callable[[str], None]) -> list[str | Reference]:
        """Texts and pictures in reading order; paragraphs between two pictures are one text.

        The title comes first when the page shows neither it nor any <h1>. accepts: whether the picture of a src
        has a place. skip: counts, by a reason, an element that is left out or a picture in it.
        """
        writer = _Writer(self.title)
        # No recursion: pages may be nested more deeply than Python's stack. None is the end of a block.
        stack: list[tuple[LexborNode | None, _Context]] = [(self._parser.body, _Context())]
        while stack:
            node, context = stack.pop()
            if node is None:
                writer.end_text()
            elif node.is_text_node and not context.left_out:
                writer.add(node.text_content or "", context.is_preformatted)
            elif node.is_element_node and node.tag not in NO_CONTENT:
                tag = node.tag or ""
                if not context.left_out and (reason := _why_left_out(node, context)):
                    skip(reason)
                    context = context._replace(left_out=reason)
                if tag == "img":
                    if context.left_out:
                        skip(f"picture in {context.left_out}")
                    elif accepts(src := (node.attributes.get("src") or "").strip()):
                        writer.add_picture(Reference(src))
                elif not context.left_out:
                    writer.begin(tag)
                if tag in BLOCKS:
                    stack.append((None, context))
                context = context._replace(
                    is_preformatted=context.is_preformatted or tag in PREFORMATTED,
                    in_section=context.in_section or tag in SECTIONS,
                )
                stack.extend((child, context) for child in reversed(list(node.iter(include_text=True))))
        return writer.finish()


def _why_left_out(node: LexborNode, context: _Context) -> str:
    """The reason for which a rule leaves out an element and all in it, or ""."""
    tag = node.tag
    if tag in EMBEDDED:
        return EMBEDDED_ELEMENT
    if tag == "nav" or (tag in ("header", "footer") and not context.in_section):
        return NAVIGATION
    if tag in ("html", "body"):
        return ""
    attributes = node.attributes
    if "hidden" in attributes or HIDING_STYLE.search(attributes.get("style") or ""):
        return HIDDEN
    if NAVIGATION_ROLES.intersection((attributes.get("role") or "").lower().split()):
        return NAVIGATION
    return NAVIGATION if NAVIGATION_CLASSES.intersection((attributes.get("class") or "").split()) else ""


class _Writer:
    """Collects the parts of a page: pieces make a paragraph, paragraphs between two pictures a text."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._shows_title = False
        self._parts: list[str | Reference] = []
        self._paragraphs: list[str] = []
        self._pieces: list[str] = []
        self._is_preformatted = False

    def begin(self, tag: str) -> None:
        """An element begins that is not left out."""
        if tag == "br":
            self._pieces.append("\n")
        elif tag in BLOCKS:
            self.end_text()
        self._shows_title |= tag == "h1"

    def add(self, piece: str, is_preformatted: bool) -> None:
        """A text node."""
        self._is_preformatted = is_preformatted
        self._pieces.append(piece if is_preformatted else WHITE_SPACE.sub(" ", piece))

    def end_text(self) -> None:
        """A paragraph ends, if there is one."""
        text = "".join(self._pieces)
        if not self._is_preformatted:
            text = re.sub(" *\n *", "\n", re.sub("  +", " ", text))
        if text.strip():
            self._paragraphs.append(text.strip("\n").rstrip() if self._is_preformatted else text.strip())
            self._shows_title |= self._paragraphs[-1] == self._title
        self._pieces.clear()

    def add_picture(self, picture: Reference) -> None:
        """A picture, which may stand in the middle of a paragraph."""
        self._end_part()
        self._parts.append(picture)

    def finish(self) -> list[str | Reference]:
        """All parts; none where nothing but a title would be."""
        self._end_part()
        needs_title = self._parts and self._title and not self._shows_title
        return [self._title, *self._parts] if needs_title else self._parts

    def _end_part(self) -> None:
        self.end_text()
        if self._paragraphs:
            self._parts.append("\n\n".join(self._paragraphs))
            self._paragraphs.clear()

"""HTML pages: reading order, what is no content, where pictures may come from, hostile pages; a real manual."""

import base64
import os
import re
from pathlib import Path

import numpy as np
import pytest

from mmtrain.config import CorpusConfig, UserError
from mmtrain.documents import Account, Document, encode_png, open_corpus, read_corpus

PNG = encode_png(np.zeros((4, 6, 3), np.uint8))


def read(root: Path, **settings) -> tuple[list[Document], Account]:
    account = Account(settings.get("on_bad", "skip"))
    config = CorpusConfig(name="my site", kind="html", path=str(root), **settings)
    return list(read_corpus(config, root, account)), account


@pytest.fixture
def page(tmp_path):
    """`page("<p>x")`: the texts of a page, "IMAGE" for a picture, and the account. pic.png is beside the page."""
    (tmp_path / "pic.png").write_bytes(PNG)

    def segments(content: str | bytes, **settings) -> tuple[list[str], Account]:
        (tmp_path / "page.html").write_bytes(content if isinstance(content, bytes) else content.encode())
        documents, account = read(tmp_path, **settings)
        parts = [part for document in documents for part in document.segments]
        return [part if isinstance(part, str) else "IMAGE" for part in parts], account

    return segments


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("<p>one <b>bold</b>\n  <i>word</i>.</p>two", ["one bold word.\n\ntwo"]),
        ("<h1>H</h1><ul><li>a<li>b</ul><table><tr><td>c<td>d</table>", ["H\n\na\n\nb\n\nc\n\nd"]),
        ("<dl><dt>t<dd>d</dl><figure><img src=pic.png><figcaption>f</figure>", ["t\n\nd", "IMAGE", "f"]),
        ("<p>in the <img src=pic.png> middle", ["in the", "IMAGE", "middle"]),
        ("<p>a&nbsp;<br>\n b&amp;c</p>", ["a\nb&c"]),
        ("x<pre>\n  if a:\n\n    b  c\n</pre>y<div><pre>z<span> \n w</span></pre></div>",
         ["x\n\n  if a:\n\n    b  c\n\ny\n\nz \n w"]),
        ("<img src=pic.png><p>a<p>b<img src=./pic.png>", ["IMAGE", "a\n\nb", "IMAGE"]),
    ],
)  # fmt: skip
def test_texts_and_pictures_in_reading_order(page, html, expected):
    segments, account = page(html)
    assert segments == expected and account.summary() == ""


@pytest.mark.parametrize(
    ("head", "body", "expected"),
    [
        ("<title>T\n t</title>", "<h2>x</h2>", "T t\n\nx"),
        ("<title>T</title>", "<h1>x</h1>", "x"),
        ("<title>T</title>", "x<h3> T</h3>", "x\n\nT"),
        ("<title>T</title>", "<header><h1>x</h1></header>y", "T\n\ny"),
        ("", "x", "x"),
    ],
)
def test_title_comes_first_where_the_page_does_not_show_it(page, head, body, expected):
    assert page(f"<html><head>{head}</head><body>{body}</body></html>")[0] == [expected]


@pytest.mark.parametrize(
    ("html", "kind"),
    [
        ("<nav>x {0}</nav>", "navigation"),
        ("<header>x {0}</header>", "navigation"),
        ("<footer>x<div>y {0}</div></footer>", "navigation"),
        ("<div class='a navheader'><table><tr><td>x {0}</table></div>", "navigation"),
        ("<div class=toc>x {0}</div>", "navigation"),
        ("<div role=Navigation>x {0}</div>", "navigation"),
        ("<p hidden>x {0}</p>", "hidden"),
        ("<div style='color: red; DISPLAY : none'>x <p>y {0}</div>", "hidden"),
    ],
)
def test_navigation_and_hidden_elements_are_counted_with_their_pictures(page, html, kind):
    segments, account = page("<p>a</p>" + html.format("<img src=pic.png>") + "<p>b</p>")
    assert segments == ["a\n\nb"]
    assert account.skipped == {f"{kind} element": 1, f"picture in {kind} element": 1} and not account.bad


def test_what_only_looks_like_navigation_is_kept(page):
    html = "<body class=toc><main><div><header>a</header></div></main><article><footer>b</footer></article>"
    segments, account = page(html + "<p class=tocs>c<script>x</script><style>x</style><!-- x --><template>x</template>")
    assert segments == ["a\n\nb\n\nc"] and account.summary() == ""


def test_pictures_that_are_left_out_are_counted_and_do_not_cut_the_sentence(page):
    others = ["http://a.b/c.png", "//a.b/c.png", "x.gif", "x.SVG?v=2", "data:image/svg+xml,<svg/>", "", "#x", "http://["]
    html = "a " + "".join(f"<img src='{src}'>" for src in others) + "<img><svg><text>x</text></svg> b"
    segments, account = page(html)
    assert segments == ["a b"] and not account.bad
    assert account.skipped == {
        "remote picture": 2,
        "picture of another format": 3,
        "picture without a valid src": 4,
        "embedded element (drawing, frame, object, sound or video)": 1,
    }
    assert account.examples["remote picture"] == "http://a.b/c.png in page.html"


def test_src_is_a_url(tmp_path):
    (tmp_path / "docs/ch 1").mkdir(parents=True)
    names = ["docs/ch 1/ü#?.png", "docs/up.png", "top.jpg", "docs/ch 1/latin\udcfc.png"]
    for name in names:
        (tmp_path / name).write_bytes(PNG)
    data = base64.b64encode(PNG).decode()
    sources = ["%C3%BC%23%3f.png?v=1#x", "\n ../up.png ", "/top.jpg", "latin%FC.png", f"data:image/png;base64,{data}"]
    (tmp_path / "docs/ch 1/a.htm").write_text("".join(f"<img src='{src}'>" for src in sources))
    (document,), account = read(tmp_path)
    assert [image.data for image in document.images] == [PNG] * 5 and account.summary() == ""
    assert document.meta | {"path": "docs/ch 1/a.htm", "title": ""} == document.meta
    assert document.meta["pictures"][1:3] == ["../up.png", "/top.jpg"]  # rules look at them
    assert re.fullmatch(r"my_site-[0-9a-f]{16}", document.id) and document.source == "my site"


def test_bad_pictures_are_named_and_nothing_outside_the_folder_is_read(page, tmp_path):
    inside = tmp_path / "site"
    inside.mkdir()
    (tmp_path / "secret.png").write_bytes(PNG)
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "link.html").symlink_to(tmp_path / "page.html")
    (inside / "cut.png").write_bytes(PNG[:-26])
    os.mkfifo(inside / "pipe.png")
    (tmp_path / "page.html").write_text("secret")
    sources = ["../secret.png", "link.png", "%2e%2e/secret.png", "gone.png", "cut.png", "pipe.png", "a%00.png"]
    sources += ["x" * 300, "data:image/png;base64,A", "data:,"]
    (inside / "a.html").write_text("text" + "".join(f"<img src='{src}'>" for src in sources) + "more")
    (document,), account = read(inside)
    assert document.segments == ("text\n\nmore",)
    assert account.bad == {
        "path leaves the folder": 5,  # with link.html, and with the NUL, which no path holds
        "missing picture": 1,
        "truncated picture": 1,
        "unreadable file": 2,
        "not a PNG, JPEG or WebP picture": 1,
        "empty file": 1,
    }
    assert account.examples["missing picture"] == "gone.png in a.html"
    assert read(inside, on_bad="skip")[0] == []
    with pytest.raises(UserError, match=r"\.\./secret\.png in a\.html: path leaves the folder; .*on_bad=skip"):
        read(inside, on_bad="fail")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("ü".encode(), "ü"),
        ("<meta charset='koi8-r'><p>ж".encode("koi8-r"), "ж"),
        ("<?xml version='1.0' encoding='ISO-8859-1'?><html><p>ü–".encode("cp1252"), "ü–"),
        ("<meta http-equiv=Content-Type content='text/html; charset=shift_jis'>漢".encode("shift_jis"), "漢"),
        ("\ufeff<meta charset=latin-1>ü".encode(), "ü"),
        ("ü".encode("utf-16"), "ü"),
        ("<meta charset=utf-16>ü".encode(), "ü"),
        ("<meta charset=punycode>ü".encode(), "ü"),
        ("<meta charset=zip>ü".encode(), "ü"),
        ("<meta charset=gb2312>€".encode("gb18030"), "€"),
    ],
)
def test_encoding_is_that_of_the_mark_the_declaration_or_utf8(page, content, expected):
    segments, account = page(content)
    assert segments == [expected] and account.summary() == ""


def test_pages_that_are_none(page):
    assert page("<p>a\xff".encode("latin-1"))[1].bad == {"bytes outside the encoding of the page": 1}
    for html, reason in {
        "<frameset><frame src=a.html></frameset>": "frameset page",
        "<head><meta http-equiv=Refresh content='0; URL=a.html'></head>x": "redirect page",
        "<title>T</title><p> </p>": "empty document",
        "": "empty document",
    }.items():
        segments, account = page(html)
        assert segments == [] and account.skipped == {reason: 1}
    assert page("<head><noscript><meta http-equiv=refresh content='0; url=a'></noscript></head>x")[0] == ["x"]
    assert page("x" * (20 * 2**20 + 1))[1].bad == {"page of more than 20 MB": 1}


def test_xhtml_writes_elements_without_content_shorter(page):
    head = "<html xmlns='http://www.w3.org/1999/xhtml'><head><title/><script src='a.js' /></head>"
    assert page(f"{head}<body><p>a<br/>b<a id='x'/></p><p>c</p></body></html>")[0] == ["a\nb\n\nc"]


@pytest.mark.parametrize(
    "html",
    [
        "<div>" * 100_000 + "x",  # minutes in the parser
        "<ul><li>" * 30_000,
        "<select>" + "<option>x</option>" * 30_000,
        "<p>" + "".join(f"<font a={number}>" for number in range(5_000)) + "<p>x" * 5_000,  # gigabytes
    ],
)
def test_pages_made_to_be_expensive_are_left_out(page, html):
    assert page(html)[1].skipped == {"page too complex to parse": 1}


@pytest.mark.parametrize(
    ("html", "num_segments"),
    [
        ("<div>" * 2_000 + "x<img src=pic.png>" + "</div>" * 2_000, 2),
        ("<img src=pic.png>" * 2_000, 2_000),
        ("<p title='" + "x" * 5_000_000 + "'>x<img src='" + "y" * 5_000_000 + "'>", 1),
        ("<li>x" * 30_000, 1),
        ("<!--" * 1_000_000 + "x", 0),
        ("<a " * 1_000_000 + '"', 0),
    ],
)
def test_odd_pages_are_read(page, html, num_segments):
    segments, account = page(html)
    assert len(segments) == num_segments and "page too complex to parse" not in account.skipped


def test_fifty_pages_a_partition_in_the_order_of_their_names(tmp_path):
    (tmp_path / "5").mkdir()
    for number in reversed(range(60)):
        (tmp_path / ("5/5.htm" if number == 51 else f"{number:02d}.HTML")).write_text(f"page {number}")
    (tmp_path / ".hidden.html").write_text("x")
    corpus, account = open_corpus(CorpusConfig(kind="html", path=str(tmp_path)), tmp_path), Account()
    first, second = corpus.partitions(account)
    texts = [document.texts for document in corpus.documents(second, account)]
    assert texts == [[f"page {number}"] for number in (51, 50, *range(52, 60))]
    assert len(first["pages"]) == 50 and account.skipped == {"hidden file": 1}


def test_folder_or_package_must_be_given(tmp_path):
    for settings, message in {
        (): "needs one of corpus.path and corpus.debian_package",
        (("path", str(tmp_path)), ("debian_package", "gimp-help-en")): "needs one of",
        (("path", str(tmp_path / "gone")),): "is not a folder",
        (("path", str(tmp_path)),): "holds no .html page",
    }.items():
        with pytest.raises(UserError, match=message):
            list(read_corpus(CorpusConfig(kind="html", **dict(settings)), tmp_path))


@pytest.mark.slow
def test_the_manual_of_gimp(tmp_path, need_command):
    """Counted independently: <img> and pages with grep, those inside navigation with Python's html.parser."""
    need_command("apt-get")
    config, account = CorpusConfig(name="gimp_help", kind="html", debian_package="gimp-help-en"), Account()
    documents = list(read_corpus(config, tmp_path, account))
    pages = [path.read_text() for path in tmp_path.glob("*/root/**/*.html")]
    num_pictures = sum(len(document.images) for document in documents)
    assert len(documents) == len(pages) > 600 and account.bad.total() == 0
    assert num_pictures + account.skipped["picture in navigation element"] == "".join(pages).count("<img ")
    assert num_pictures > 2_500 and account.skipped["navigation element"] >= 2 * len(pages)
    smudge = next(document for document in documents if document.meta["path"].endswith("/gimp-tool-smudge.html"))
    texts = ["3.16. Smudge", "by clicking on the tool icon:", "in Toolbox,"]
    assert [text for text in texts if text in "\n".join(smudge.texts)] == texts and len(smudge.images) > 5

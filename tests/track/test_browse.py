"""The page of documents: whole, self-contained, true to the tokens, and harmless whatever the corpus says."""

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from mmtrain.config import ImageTokenizerConfig, TextTokenizerConfig
from mmtrain.documents import Document, Image, decode_square, encode_png
from mmtrain.tokens import ImageTokenizer, TextTokenizer, Vocabulary, document_to_tokens
from mmtrain.track.browse import DETAILED_PICTURES, SEGMENTS_AT_ONCE, BrowseData, Shown, write_browse

HOSTILE = "</script></style><img src=x onerror=alert(1)>\" onmouseover='x' \x1b[31m\u202egnp.exe"
torch.manual_seed(0)
IMAGE = ImageTokenizer(ImageTokenizerConfig(levels=[4, 4], width=4), 16).eval()
TEXT = TextTokenizer.train(["a red circle over a blue square"] * 3, TextTokenizerConfig(vocab_size=270))
VOCABULARY = Vocabulary(TEXT.size, IMAGE.num_codes, 4)


def picture(seed, width=40, height=24):
    data = encode_png(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    return Image(data, width, height, hashlib.sha256(data).hexdigest(), "png")


def shown(document, split="train", **more):
    pixels = [decode_square(image.data, IMAGE.image_size) for image in document.images]
    codes = list(IMAGE.encode(np.stack(pixels))) if pixels else []
    tokens = document_to_tokens(document, TEXT, codes, VOCABULARY)
    return Shown(document, split, tokens.tokens, tokens.segments, **more)


MIXED = Document("mixed", "test", ("a red circle", picture(1), "naïve 猫 כדור"), {"cluster": "c7"})
EVIL = Document("evil", HOSTILE, (HOSTILE, picture(2), HOSTILE), {HOSTILE: [HOSTILE], "cluster": HOSTILE})
LONG = Document("long", "test", tuple(part for i in range(20) for part in (f"text {i}", picture(i))), {})
PICTURES = Document("pictures", "test", (picture(3), picture(4)), {})


def write(folder, *documents, **more):
    settings = {"num_pictures": 30, "text": TEXT, "image": IMAGE, "vocabulary": VOCABULARY, "sequence_length": 64}
    data = BrowseData("corpus test", "a sample", documents, **settings | more)
    return write_browse(folder / "pages" / "browse.html", data)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A page with one document of each kind."""
    near = [(EVIL, 0.71), (Document("copy", "test", ("a copy",), {"cluster": "c7"}), 0.7)]
    documents = [
        shown(MIXED, cluster_size=3, neighbours=near),
        shown(EVIL, "validation", cluster_size=1, neighbours=[]),
        shown(LONG),
        shown(PICTURES),
    ]
    return write(tmp_path_factory.mktemp("page"), *documents, facts=[(HOSTILE, HOSTILE), ("documents", 4)])


class Elements(HTMLParser):
    """What a browser would see: tags, attributes, visible text, and whether what opens is closed."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "input", "br", "option"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "option":
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_holds_every_text_as_text_and_closes_what_it_opens(path):
    page = Elements(path.read_text())
    assert not page.open
    words = "".join(page.words)
    for document in (MIXED, LONG):
        assert document.id in words and all(text in words for text in document.texts)
    assert HOSTILE.replace("\x1b", "\ufffd").replace("\u202e", "\ufffd") in words
    assert "1 of 3 in its cluster (c7)" in words and "same cluster" in words and "0.710" in words


def test_nothing_comes_from_outside_and_only_our_script_may_run(path):
    source = path.read_text()
    page = Elements(source)
    script = re.search(r"<script>(.*?)</script>", source, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in source and f"script-src 'sha256-{digest}'" in source
    assert source.index("Content-Security-Policy") < source.index("<style>")
    links = [value for name, value in page.attributes if name in ("src", "href")]
    assert all(value.startswith("data:image/webp;base64,") for value in links)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.tags.count("script") == 1 and not {"link", "iframe", "object", "base"} & set(page.tags)
    assert "http://" not in source and "https://" not in source and "url(" not in source
    assert not re.search("[\x00\x1b\u202a-\u202e\u2066-\u2069\ud800-\udfff]", source)


def test_every_picture_decodes(path):
    uris = re.findall(r'src="data:image/webp;base64,([^"]+)"', path.read_text())
    for uri in uris:
        with Pillow.open(io.BytesIO(base64.b64decode(uri, validate=True))) as opened:
            opened.load()
    pictures, detailed = (1 + 1 + 20 + 2), (1 + 1 + DETAILED_PICTURES + 2)
    assert len(uris) == pictures + 2 * detailed + 1  # one neighbour has a picture


def test_the_reconstruction_is_what_the_codes_decode_to(path):
    article = path.read_text().split("<article")[4]
    _, back, codes, *_ = re.findall(r'src="data:image/webp;base64,([^"]+)"', article)
    expected = IMAGE.encode(decode_square(PICTURES.images[0].data, 16)[None])
    with Pillow.open(io.BytesIO(base64.b64decode(back))) as opened:
        assert (np.asarray(opened.convert("RGB")) == IMAGE.decode(expected)[0]).all()
    assert " ".join(re.search(r"<pre>([\d\s]+)</pre>", article)[1].split()) == " ".join(map(str, expected[0]))
    with Pillow.open(io.BytesIO(base64.b64decode(codes))) as opened:
        assert opened.size == (2, 2)


def test_tokens_stand_at_their_places_with_their_ids(path):
    article = path.read_text().split("<article")[1]
    tokens = shown(MIXED)
    places = re.findall(r"tokens ([\d,]+)–([\d,]+) \((\d+)\)</div>", article)
    assert [(int(a), int(b), int(n)) for a, b, n in places] == [
        (s.start, s.start + s.length - 1, s.length) for s in tokens.segments
    ]
    ids = [re.split(r"[ +]", group) for group in re.findall(r'data-ids="([\d +]+)"', article)]
    text = [s for s in tokens.segments if s.kind == "text"]
    assert [list(map(int, group)) for group in ids] == [tokens.tokens[s.start :][: s.length].tolist() for s in text]


def test_long_documents_fold_their_end_and_tell_how_often_they_exceed_a_sequence(path):
    article = path.read_text().split("<article")[3]
    assert f"{len(LONG.segments) - SEGMENTS_AT_ONCE} more segments" in article
    assert re.search(r"\d+ tokens, \d\.\d times what fits in 64", article)


def test_tokens_of_another_state_are_told_from_the_document(tmp_path):
    other = shown(LONG)
    source = write(tmp_path, Shown(MIXED, "train", other.tokens, other.segments)).read_text()
    assert "belong to another state of the corpus" in source and 'data-ids="' not in source
    tokens = shown(MIXED)
    for broken in (tokens.tokens[::-1].copy(), tokens.tokens[:-1]):
        source = write(tmp_path, Shown(MIXED, "train", broken, tokens.segments)).read_text()
        assert "belong to another state of the corpus" in source
    changed = Document("mixed", "test", ("a blue circle", *MIXED.segments[1:]), {})
    source = write(tmp_path, Shown(changed, "train", tokens.tokens, tokens.segments)).read_text()
    assert source.count("gives other tokens for this text") == 1
    assert "no tokens of this document" in write(tmp_path, Shown(MIXED, "train")).read_text()


def test_secrets_of_a_text_are_in_neither_view(tmp_path):
    source = write(tmp_path, shown(Document("s", "test", ("key hf_" + "a1B2" * 8,), {}))).read_text()
    assert "[redacted]" in source and "a1B2" not in source and 'data-ids="' not in source


def test_many_large_pictures_stay_within_the_limit(tmp_path):
    large = Document("large", "test", tuple(picture(i, 400, 300) for i in range(6)), {})
    few, many = (write(tmp_path, shown(large), num_pictures=n).stat().st_size for n in (6, 1200))
    assert many < 100_000 < few


class Browser:
    """Chromium without a window, spoken to over its DevTools pipe (file descriptors 3 and 4)."""

    def __init__(self, profile):
        to_browser, self.writing = os.pipe()
        self.reading, from_browser = os.pipe()
        flags = f"--headless --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir={profile}"
        line = f"exec chromium {flags} 3<&{to_browser} 4>&{from_browser} 2>/dev/null"
        self.process = subprocess.Popen(["bash", "-c", line], pass_fds=(to_browser, from_browser))
        os.close(to_browser)
        os.close(from_browser)
        self.replies = os.fdopen(self.reading, "rb")
        self.sent, self.session, self.complaints = 0, {}, []

    def ask(self, method, **params):
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params, **self.session}
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while True:
            reply = json.loads(self._message())
            if reply.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.complaints.append(reply["params"])
            if reply.get("id") == self.sent:
                assert "error" not in reply, reply
                return reply["result"]

    def _message(self):
        message = b""
        while not message.endswith(b"\0"):
            byte = self.replies.read(1)
            assert byte, "chromium has ended"
            message += byte
        return message[:-1]

    def open(self, url):
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Runtime", "Log", "Page"):
            self.ask(f"{domain}.enable")
        self.ask("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && !!document.querySelector('#count')?.textContent")

    def value(self, expression):
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression, seconds=20):
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.05)

    def key(self, key):
        self.value(f"document.body.dispatchEvent(new KeyboardEvent('keydown', {{key: {key!r}, bubbles: true}}))")

    def close(self):
        self.session = {}
        self.ask("Browser.close")
        self.process.wait(30)
        os.close(self.writing)
        self.replies.close()


@pytest.fixture
def browser(tmp_path, need_command):
    need_command("chromium")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


def test_the_page_works_in_a_browser_without_a_complaint(path, browser):
    browser.open(path.as_uri())
    names = "[...document.querySelectorAll('.card:not([hidden]) h2')].map(h => h.textContent).join(' ')"
    assert browser.value(names) == "mixed evil long pictures"
    browser.key("t")
    browser.until("!!document.querySelector('#d1 .pieces span')")
    ids = shown(MIXED).tokens
    assert browser.value("document.querySelector('#d1 .pieces span').title") == f"token 0: id {ids[0]}"
    texts = "[...document.querySelectorAll('#d1 .pieces')].map(p => p.textContent)"
    browser.until(f"{texts}.every(text => text)")
    assert browser.value(texts) == MIXED.texts

    def choose(id, value):
        control = f"document.querySelector('#{id}')"
        events = f"{control}.dispatchEvent(new Event('input')), {control}.dispatchEvent(new Event('change'))"
        browser.value(f"{control}.value = {value!r}, {events}")
        return browser.value(names)

    assert choose("search", "猫 RED") == "mixed" and choose("search", "") == "mixed evil long pictures"
    assert choose("kind", "picture only") == "pictures" and choose("kind", "") != "pictures"
    assert choose("split", "validation") == "evil" and choose("split", "") != "evil"
    assert choose("order", "tokens").startswith("long")
    browser.key("j")
    browser.key("j")
    browser.key("k")
    assert browser.value("document.querySelector('.card.current h2').textContent") == "long"
    assert browser.value("document.querySelector('#count').textContent") == "1 / 4"
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    assert browser.complaints == []

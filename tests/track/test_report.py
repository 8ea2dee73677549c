"""The report: whole, self-contained, and harmless whatever strangers wrote into captions and pictures."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from mmtrain.documents import Document
from mmtrain.documents import Image as Picture
from mmtrain.flops import Ledger, OwnRun, compute_table
from mmtrain.track.report import ReportData, write_report


def png(color="red", size=(64, 64), format="PNG"):
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, format=format)
    return out.getvalue()


def document(caption):
    data = png("blue")
    return Document("d0", "test", (caption, Picture(data, 64, 64, "0" * 64, "png")), {})


def full(caption="a red circle", picture=None):
    picture = png() if picture is None else picture
    ledger = Ledger()
    ledger.book("train_image", 3_172_000_000_000_000)
    return ReportData(
        title=caption,
        summary=[("tokens", 1_234_567), ("training flops", 3_172_000_000_000_000), ("name", caption)],
        corpus=[("pictures", 795), (caption, caption)],
        metrics=[
            {"step": s, "tokens": s * 512, "loss": 5 / s, "loss_text": None, "val_loss": 6 / s} for s in range(1, 9)
        ],
        tokenizer={"psnr": 23.4, "codebook_use": 0.97},
        reconstructions=picture,
        neighbours=[(document(caption), [(document(caption), 0.71)]), (document(caption), [])],
        generated=[(caption, picture, [picture, picture]), (caption, None, [])],
        captions=[(picture, caption, caption)],
        evaluation={"colors": {"value": 0.97, "n": 500}, caption: caption},
        ledger=ledger.to_dict(),
        comparison=picture,
        compute=compute_table([OwnRun(caption, 3_172_000_000_000_000)]),
        environment={"cpu": "x86", caption: caption},
        commands=["mmtrain train experiment=stamps", caption],
    )


class Elements(HTMLParser):
    """Collects what a browser would see: tags, attributes and visible text."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)


def test_all_sections_in_order_and_human_numbers(tmp_path):
    source = write_report(tmp_path, full()).read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", source)
    assert headings[:4] == ["What it was trained on", "Loss curves", "Image tokenizer", "Retrieved neighbors"]
    assert headings[4:7] == ["Text to image", "Image to text", "Evaluation"]
    assert headings[7:] == ["Compute", "Environment", "How to reproduce it"]
    assert "3.17e15 FLOPs" in source and "1.23 M" in source and "score 0.710" in source and "32.9 M ×" in source


def test_an_empty_run_still_gives_a_page(tmp_path):
    source = write_report(tmp_path, ReportData("empty")).read_text()
    assert "<h1>empty</h1>" in source and "<h2>" not in source


def test_nothing_comes_from_outside(tmp_path):
    source = write_report(tmp_path, full()).read_text()
    page = Elements(source)
    assert source.index("Content-Security-Policy") < source.index("<style>")
    assert "default-src 'none'" in source
    links = [value for name, value in page.attributes if name in ("src", "href")]
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in links)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert "url(" not in source and "@import" not in source


HOSTILE = {
    "script": "<script>alert(1)</script>",
    "closing": "</script></style></title><img src=x onerror=alert(1)>",
    "attribute": '" onmouseover="alert(1)" x=\'',
    "control": "a\x00b\x1b[31m\u202egnp.exe\u2066\ud800\ufffe",
    "markup": "{{7*7}} ${x} &lt;script&gt; javascript:alert(1)",
    "secret": "hf_" + "a1B2" * 8,
    "long": "<b>" * 350_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_harmless_everywhere(tmp_path, name):
    pages = [replace(full(caption), metrics=[]) for caption in ("a red circle", HOSTILE[name])]
    tame, source = (write_report(tmp_path, page).read_text() for page in pages)
    page = Elements(source)
    assert page.tags == Elements(tame).tags  # no text became an element
    assert not any(attribute.startswith("on") for attribute, _ in page.attributes)
    assert not re.search("[\x00\x1b\u202a-\u202e\u2066-\u2069\ud800-\udfff]", source)
    assert "a1B2a1B2" not in source
    assert len(source) < len(tame) + 200_000


def test_long_captions_are_cut_and_say_so(tmp_path):
    assert "(1,050,000 characters)" in write_report(tmp_path, full(HOSTILE["long"])).read_text()


def test_right_to_left_captions_keep_their_letters(tmp_path):
    assert "כדור אדום" in write_report(tmp_path, full("כדור אדום")).read_text()


@pytest.mark.parametrize(
    "data", [b"", b"<svg onload=alert(1)>", b"GIF89a" + b"\0" * 50, png()[:60], png()[:-20] + b"x" * 9]
)
def test_bad_pictures_become_a_note(tmp_path, data):
    source = write_report(tmp_path, replace(full(picture=data), metrics=[])).read_text()
    assert "[" in source and "onload" not in source and b"GIF89a" not in source.encode()


def test_pictures_are_encoded_again(tmp_path):
    trailing = png("green") + b"<script>alert(1)</script>" * 3
    source = write_report(tmp_path, full(picture=trailing)).read_text()
    payloads = [base64.b64decode(match) for match in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", source)]
    assert payloads and all(payload.startswith(b"\x89PNG") and b"script" not in payload for payload in payloads)


def test_small_pictures_are_enlarged_by_a_whole_factor_and_stay_sharp(tmp_path):
    source = write_report(tmp_path, ReportData("x", generated=[("c", None, [png(size=(64, 64))])])).read_text()
    assert 'class="pixels"' in source and 'width="192" height="192"' in source

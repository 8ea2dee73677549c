"""Stamps from an extracted folder: languages, SVG, variants, sizes; and what is said where apt fails."""

import re
from pathlib import Path

import numpy as np
import pytest

from mmtrain.config import CorpusConfig, UserError
from mmtrain.documents import Account, decode_square, encode_png, read_corpus

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="72pt" height="36pt"><rect width="96" height="48" fill="red"/></svg>'
)


@pytest.fixture
def extracted(tmp_path: Path) -> Path:
    animals = tmp_path / "usr/share/tuxpaint/stamps/animals/birds"
    animals.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(10):
        size = 600 if number == 0 else 20
        (animals / f"bird{number}.png").write_bytes(encode_png(rng.integers(0, 255, (size, size, 3)).astype(np.uint8)))
        captions = f"Bird {number}.\n\nde.utf8=Vogel {number}.\nsr@latin.utf8= Ptica = {number}\nfr.utf8=\n"
        (animals / f"bird{number}.txt").write_text(captions)
    (animals / "bird1_mirror.png").write_bytes(encode_png(np.zeros((9, 9, 3), np.uint8)))
    (animals / "bird1.svg").write_text(SVG)
    (animals / "drawn.svg").write_text(SVG)
    (animals / "drawn.txt").write_text("A drawing.\n")
    (animals / "broken.svg").write_text("<svg")
    (animals / "broken.txt").write_text("A broken drawing.\n")
    return tmp_path


def read(path: Path, languages: list[str]):
    config = CorpusConfig(kind="stamps", path=str(path), languages=languages)
    account = Account()
    return list(read_corpus(config, path, account)), account


def test_one_document_per_picture_and_language(extracted):
    documents, _ = read(extracted, ["en", "de", "sr@latin"])
    paths = {document.meta["path"] for document in documents}
    assert len(paths) == 11
    for path in paths - {"animals/birds/drawn.svg"}:
        number = path[-5]
        mine = {d.meta["language"]: d.texts[0] for d in documents if d.meta["path"] == path}
        assert mine == {"en": f"Bird {number}.", "de": f"Vogel {number}.", "sr@latin": f"Ptica = {number}"}
    assert len({document.id for document in documents}) == len(documents) == 31
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", document.id) for document in documents)
    assert {document.meta["category"] for document in documents} == {"animals"}


def test_variants_and_faults_are_counted(extracted):
    (extracted / "usr/share/tuxpaint/stamps/animals/alone.png").write_bytes(encode_png(np.zeros((9, 9, 3), np.uint8)))
    account = read(extracted, ["en", "de"])[1]
    assert account.examples == {
        "mirrored or flipped variant": "animals/birds/bird1_mirror.png",
        "the same picture in another format": "animals/birds/bird1.svg",
        "no .txt beside it": "animals/alone.png",
        "no caption in de": "animals/birds/broken.svg",
        "SVG cannot be drawn": "animals/birds/broken.svg",
    }
    assert account.bad == {"no .txt beside it": 1, "SVG cannot be drawn": 1}


def test_svg_is_rendered_and_big_pictures_are_stored_smaller(extracted):
    by_name = {Path(d.meta["path"]).stem: d for d in read(extracted, ["en"])[0]}
    drawn, big, small = (by_name[name] for name in ("drawn", "bird0", "bird2"))
    assert (drawn.meta["stored"], drawn.images[0].width, drawn.images[0].height) == ("rendered", 256, 128)
    assert (decode_square(drawn.images[0].data, 64)[32, 32] == (255, 0, 0)).all()
    assert (big.meta["stored"], big.images[0].width) == ("downscaled", 256)
    assert (small.meta["stored"], small.images[0].width) == ("original", 20)


def test_unknown_language_names_the_known_ones(extracted):
    with pytest.raises(UserError, match=r"no stamp has a caption in xx; there are de, en, sr@latin\.$"):
        read(extracted, ["en", "xx"])


def test_failing_apt_is_quoted_and_other_corpora_named(tmp_path, monkeypatch):
    (tmp_path / "apt-get").write_text('#!/bin/sh\necho "E: Unable to locate package" >&2\nexit 100\n')
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"Unable to locate package.*corpus=pairs"):
        list(read_corpus(CorpusConfig(kind="stamps"), tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []

"""MMC4 as shipped and as OpenFlamingo writes it: pictures before their sentences, nothing lost in silence."""

import base64
import gzip
import hashlib
import io
import json
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mmtrain.config import CorpusConfig, UserError
from mmtrain.documents import Document, encode_png
from mmtrain.documents.corpus import Account
from mmtrain.documents.mmc4 import Mmc4
from tests.documents.conftest import shape

SENTENCES = ["Zero.", "One.", "Two.", "Three."]


def png(number: int) -> bytes:
    return encode_png(np.full((4, 4, 3), number, dtype=np.uint8))


def image(number: int, place: int | None, **more) -> dict:
    info = {"image_name": f"{number}.png", "raw_url": f"https://example.org/{number}", "matched_text_index": place}
    return {**info, "matched_sim": 0.3, **more}


def page(*infos: dict, **more) -> dict:
    return {"url": "https://example.org", "text_list": SENTENCES, "image_info": list(infos), **more}


def inside(number: int, place: int) -> dict:
    return image(number, place, image_base64=base64.b64encode(png(number)).decode())


def lines(*pages: dict | bytes) -> bytes:
    return b"".join((p if isinstance(p, bytes) else json.dumps(p).encode()) + b"\n" for p in pages)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures 0 to 9 by their image_name, 10 by the hash of its URL with a suffix and 11 without."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.png").write_bytes(png(number))
    for number, suffix in ((10, ".webp"), (11, "")):
        hashed = hashlib.sha256(f"https://example.org/{number}".encode()).hexdigest()
        (folder / f"{hashed}{suffix}").write_bytes(png(number))
    return folder


def read(path: Path, folder: Path | None = None, **options) -> tuple[list[Document], Account]:
    config = CorpusConfig(name="mmc4", kind="mmc4", path=str(path), image_folder=folder and str(folder), **options)
    account = Account(config.on_bad)
    corpus = Mmc4(config, Path())
    documents = [document for part in corpus.partitions(account) for document in corpus.documents(part, account)]
    assert len({document.id for document in documents}) == len(documents)
    return documents, account


def write_zip(path: Path, members: dict[str, bytes], **options) -> Path:
    with zipfile.ZipFile(path, "w", **{"compression": zipfile.ZIP_DEFLATED, **options}) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def test_pictures_come_before_their_sentences(tmp_path, folder):
    write_zip(
        tmp_path / "docs_no_face_shard_0_v3.jsonl.zip",
        {"docs_no_face_shard_0_v3.jsonl": lines(page(image(1, 2), image(2, 0), image(3, 2)), page(image(10, 3)))},
    )
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(page(image(11, 1)))))
    (tmp_path / "b.jsonl").write_bytes(lines(page()) + b"\n" + lines(page(image(4, 0)))[:-1])
    documents, account = read(tmp_path, folder)
    assert [shape(document) for document in documents] == [
        ["Zero.", 11, "One. Two. Three."],
        ["Zero. One. Two. Three."],
        [4, "Zero. One. Two. Three."],
        [2, "Zero. One.", 1, 3, "Two. Three."],
        ["Zero. One. Two.", 10, "Three."],
    ]
    hashed = hashlib.sha256(b"b.jsonl").hexdigest()[:16]
    assert documents[2].id == f"mmc4-{hashed}-3"
    assert documents[2].meta == {
        "path": "b.jsonl:3",
        "url": "https://example.org",
        "pictures": ["https://example.org/4"],
    }
    assert not account.summary() and documents == read(tmp_path, folder)[0]


def test_tars_of_open_flamingo(tmp_path):
    odd = image(4, 3, image_base64=str(base64.b64encode(png(4))))  # its script writes b'...'
    members = [
        ("k1.json", json.dumps(page(inside(3, 1), image(5, 2))).encode()),
        ("k2.json", json.dumps(page(odd)).encode()),
        ("k1.json", json.dumps(page()).encode()),
        ("../../etc/passwd.json", b"{}"),
        ("k3.txt", b""),
        ("k4.json", json.dumps(page(image(6, 0, image_base64="!!!"), image(7, 0, image_base64=""))).encode()),
    ]
    path = write_tar(tmp_path / "0.tar", members)
    documents, account = read(path)
    assert [shape(document) for document in documents] == [
        ["Zero.", 3, "One.\n\nTwo. Three."],
        ["Zero. One. Two.", 4, "Three."],
        ["Zero. One. Two. Three."],
    ]
    assert account.bad == dict.fromkeys(["duplicate key", "path leaves the tar", "broken base64", "empty file"], 1)
    assert account.skipped == {"member that is not needed": 1, "picture that was not downloaded": 1}
    path.write_bytes(path.read_bytes()[:2000])
    documents, account = read(path)
    assert len(documents) == 1 and account.bad == {"damaged tar": 1}


@pytest.mark.parametrize(
    ("row", "place"), [([0.1, 0.2, 0.9, 0.3], 2), ([5, 1.0, 5, 0], 0), ([-1, -2, -0.5, 10**400], 3)]
)
def test_without_an_index_the_most_similar_sentence_is_taken(tmp_path, folder, row, place):
    (tmp_path / "a.jsonl").write_bytes(lines(page(image(1, 0), image(2, None), similarity_matrix=[[0, 0, 0, 1], row])))
    documents, account = read(tmp_path, folder)
    expected = [1, 2, "Zero. One. Two. Three."] if place == 0 else None
    assert shape(documents[0]) == (expected or [1, " ".join(SENTENCES[:place]), 2, " ".join(SENTENCES[place:])])


BAD_RECORDS = {
    "json is no JSON object": [b"{", b"[]", b"\xff", b'{"a":' * 100_000, b"[" * 100_000, b"9" * 5000],
    "text_list is no list of strings": [{"image_info": []}, page(text_list=["a", None])],
    "image_info is no list of objects": [{"text_list": []}, page(image_info=["a"])],
    "picture without a place": [
        page(image(1, None)),
        page(image(1, 4)),
        page(image(1, -1)),
        page(image(1, True)),
        page(image(1, 0), text_list=[]),
        page(image(1, None), similarity_matrix=[[1, 2, 3]]),
        page(image(1, None), similarity_matrix=[[1, 2, 3, float("nan")]]),
        page(image(1, None), similarity_matrix=[]),
        page(image(1, None), text_list=[], similarity_matrix=[[]]),
    ],
}


@pytest.mark.parametrize("reason", BAD_RECORDS)
def test_a_line_that_makes_no_document_is_counted(tmp_path, folder, reason):
    bad = BAD_RECORDS[reason]
    (tmp_path / "a.jsonl").write_bytes(lines(page(image(1, 0)), *bad, page(image(2, 0))))
    documents, account = read(tmp_path, folder)
    assert [shape(document)[0] for document in documents] == [1, 2]
    assert account.bad == {reason: len(bad)} and account.examples == {reason: "a.jsonl:2"}


def test_pictures_that_cannot_be_had(tmp_path, folder):
    (tmp_path / "secret.png").write_bytes(png(9))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "large.png").write_bytes(bytes(2**21))
    (folder / "broken.png").write_bytes(b"<html>")
    names = ["../secret.png", "/etc/passwd", "..", "", "a\0b", "\ud800", "x" * 300, None, 7, "link.png"]
    infos = [image(12, 0, image_name=name) for name in [*names, "large.png", "broken.png"]]
    (tmp_path / "a.jsonl").write_bytes(lines(page(*infos), page(image(1, 0))))
    expected = {
        "unreadable file": 1,
        "path leaves the folder": 1,
        "picture of too many bytes": 1,
        "not a PNG, JPEG or WebP picture": 1,
    }
    documents, account = read(tmp_path, folder, max_pixels=1000)
    assert [shape(document)[0] for document in documents] == ["Zero. One. Two. Three.", 1]
    assert account.bad == expected and account.skipped == {"picture that was not downloaded": 8}
    documents, account = read(tmp_path, folder, max_pixels=1000, on_bad="skip")
    assert len(documents) == 1 and account.skipped["document with a bad picture"] == 1
    with pytest.raises(UserError, match=r"^a.jsonl:1, ../secret.png: picture that was not downloaded"):
        read(tmp_path, folder, on_bad="fail")


def test_settings_that_are_missing_are_one_sentence(tmp_path, folder):
    (tmp_path / "a.jsonl").write_bytes(lines(page(image(1, 0))))
    with pytest.raises(UserError, match=r"a.jsonl:1, 1.png: .* set corpus.image_folder"):
        read(tmp_path)
    with pytest.raises(UserError, match="image_folder=.* is no folder"):
        read(tmp_path, tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(lines(page(inside(1, 0))))
    assert shape(read(tmp_path)[0][0])[0] == 1


@pytest.mark.parametrize("kind", ["zip", "gz"])
def test_an_archive_cut_or_flipped_anywhere_delivers_what_it_can_and_is_named(tmp_path, kind):
    data = lines(*(page(url=hashlib.sha256(bytes([n])).hexdigest()) for n in range(40)))
    path = tmp_path / f"a.jsonl.{kind}"
    content = gzip.compress(data) if kind == "gz" else write_zip(path, {"a.jsonl": data}).read_bytes()
    num_partial = 0
    for cut in range(0, len(content), 97):
        path.write_bytes(content[:cut])
        documents, account = read(path)
        assert set(account.bad) == {"damaged file" if cut or kind == "zip" else "empty file"} and len(documents) < 40
        num_partial += len(documents) > 0
    assert num_partial > 10 or kind == "zip"
    for place in range(0, len(content), 13):
        flipped = bytearray(content)
        flipped[place] ^= 0xFF
        path.write_bytes(flipped)
        documents, account = read(path)
        assert len(documents) == 40 or account.summary()


def test_members_of_a_zip(tmp_path):
    members = {"x/a.jsonl": lines(page(), b"{"), "README": b"", "__MACOSX/._a.jsonl": b"\0", "b.jsonl": lines(page())}
    documents, account = read(write_zip(tmp_path / "a.jsonl.zip", members))
    assert [document.meta["path"] for document in documents] == ["a.jsonl.zip:1", "a.jsonl.zip:3"]
    assert account.bad == {"json is no JSON object": 1} and account.skipped == {"member that is not needed": 2}
    write_zip(tmp_path / "a.jsonl.zip", {"a.jsonl": lines(page())}, compression=zipfile.ZIP_LZMA)
    assert read(tmp_path / "a.jsonl.zip")[1].bad == {"damaged file": 1}


@pytest.mark.parametrize("kind", ["zip", "gz"])
@pytest.mark.parametrize("fill", [b"0" * 100, b" " * 99 + b"\n"])
def test_a_bomb_is_stopped_in_little_memory(tmp_path, monkeypatch, kind, fill):
    monkeypatch.setattr("mmtrain.documents.mmc4.LARGEST_RECORD_BYTES", 2**20)
    data = lines(page()) + fill * 300_000
    path = tmp_path / f"a.jsonl.{kind}"
    if kind == "gz":
        path.write_bytes(gzip.compress(data))
    else:
        write_zip(path, {"a.jsonl": data})
    del data
    tracemalloc.start()
    documents, account = read(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(documents) == 1 and account.bad == {"unpacks to too much": 1}
    assert peak_bytes < 6 * 2**20


def test_a_line_that_is_too_long_costs_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("mmtrain.documents.mmc4.LARGEST_RECORD_BYTES", 2**16)
    (tmp_path / "a.jsonl").write_bytes(lines(page(), b"x" * 3_000_000, page(), b"x" * (2**16), page()))
    write_tar(tmp_path / "b.tar", [("k.json", b"x" * (2**16 + 1)), ("l.json", json.dumps(page()).encode())])
    documents, account = read(tmp_path)
    assert [document.meta["path"] for document in documents] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:5", "b.tar/l"]
    assert account.bad == {"record too large": 3}

"""Interleaved documents in webdataset tars: all of them come, or are counted under the right name."""

import io
import json
import os
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import webdataset

from mmtrain.config import CorpusConfig, UserError
from mmtrain.documents import Document, encode_png, image_from_bytes
from mmtrain.documents.corpus import Account
from mmtrain.documents.webdataset import WebDataset
from mmtrain.shards.writer import write_documents
from tests.documents.conftest import shape, write_tar

BLOCK = 512


def png(number: int) -> bytes:
    return encode_png(np.full((4, 4, 3), number, dtype=np.uint8))


def page(number: int) -> dict[str, bytes]:
    """Text, picture, text, picture; the json first."""
    content = {"texts": [f"page {number}", None, "middle", None], "images": [None, "0.png", None, "b.png"]}
    return {
        f"{number:04d}.json": json.dumps(content).encode(),
        f"{number:04d}.0.png": png(number),
        f"{number:04d}.b.png": png(number + 100),
    }


def read(path: Path | str, **options) -> tuple[list[Document], Account]:
    config = CorpusConfig(name="pages", kind="webdataset", path=str(path), **options)
    account = Account(config.on_bad)
    corpus = WebDataset(config, Path())
    documents = [document for part in corpus.partitions(account) for document in corpus.documents(part, account)]
    assert len({document.id for document in documents}) == len(documents)
    return documents, account


def gray(data: bytes) -> int:
    return np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))[0, 0, 0]


def whole(number: int) -> list:
    return [f"page {number}", number, "middle", number + 100]


def test_members_of_a_document_come_in_any_order(tmp_path):
    write_tar(tmp_path / "b.tar", page(1), dict(reversed(page(2).items())))
    (tmp_path / "a").mkdir()
    with webdataset.TarWriter(str(tmp_path / "a" / "a.tar")) as writer:  # sorts the members, with extended headers
        members = {name.partition(".")[2].upper(): data for name, data in page(3).items()}
        members["JSON"] = members["JSON"].replace(b"b.png", b"B.Png")
        writer.write({"__key__": "x/k", **members})
    documents, account = read(tmp_path)
    assert [shape(document) for document in documents] == [whole(3), whole(1), whole(2)]
    assert documents[0].source == "pages" and documents[0].meta == {"path": "a/a.tar/x/k"}
    assert not account.summary()
    assert documents == read(tmp_path)[0]


def test_what_mmtrain_writes_comes_back(tmp_path):
    image = image_from_bytes(png(7), 100)
    written = [
        Document("a-1", "shapes", ("one", image, image, "two"), {"split": "validation", "scene": {"n": [1, None]}}),
        Document("a-2", "shapes", (image,), {"url": "https://example.org"}),
    ]
    write_documents(tmp_path, written)
    documents, account = read(tmp_path)
    assert [document.segments for document in documents] == [document.segments for document in written]
    assert documents[0].meta == {"path": "shard-000000.tar/a-1", **written[0].meta}
    assert documents[1].meta["url"] == "https://example.org" and not account.summary()


def test_texts_alone_pictures_alone_and_pairs(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        {"1.txt": "\ufeffétude\n".encode(), "2.jpg": png(2), "3.json": b'{"texts": ["a", "b"]}'},
        {"4.json": b'{"texts": ["a", "b"], "images": []}', "5.png": png(5), "5.txt": b"five"},
        {"6.json": b'{"texts": [], "images": ["0.png"]}', "6.0.png": png(6)},
    )
    documents, account = read(tmp_path)
    assert [shape(d) for d in documents] == [["étude"], [2], ["a\n\nb"], ["a\n\nb"], ["five", 5], [6]]
    assert not account.summary()


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def huge_png() -> bytes:
    """A header of 200 megapixels, and next to nothing behind it."""
    size = (20_000).to_bytes(4, "big") + (10_000).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\0\0\0") + chunk(b"IDAT", zlib.compress(b""))


def half_jpeg() -> bytes:
    buffer = io.BytesIO()
    PIL.Image.effect_noise((64, 64), 50).save(buffer, format="JPEG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def document(key: str, content: object, **members: bytes) -> dict[str, bytes]:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return {f"{key}.json": data, **{f"{key}.{name.replace('_', '.')}": data for name, data in members.items()}}


ONE = {"texts": ["words", None], "images": [None, "0.jpg"]}
BAD_RECORDS = {
    "json is no JSON object": document("bad", b'{"texts": ["\xff"]}'),
    "json is no JSON object ": document("bad", b"[" * 100_000),
    "json is no JSON object  ": document("bad", b'{"a":' * 100_000),
    "json too large": document("bad", b'"' + b" " * 2**24 + b'"'),
    "neither texts nor images": document("bad", {"caption": "of img2dataset"}, jpg=png(1)),
    "texts is no list": document("bad", {"texts": "abc"}),
    "texts and images are not aligned": document("bad", {"texts": ["a", None], "images": [None]}),
    "texts and images are not aligned ": document("bad", {"texts": ["a"], "images": ["0.jpg"]}, **{"0_jpg": png(1)}),
    "texts and images are not aligned  ": document("bad", {"texts": [None], "images": [None]}),
    "a text that is no string": document("bad", {"texts": [["a"]]}),
    "an image that is no name": document("bad", {"images": [3]}),
    "meta nested too deep": document("bad", {"texts": ["a"], "meta": json.loads('{"a":' * 50 + "1" + "}" * 50)}),
    "duplicate key": page(1),
    "duplicate key ": {**page(2), "0001.txt": b"late"},
    "no json": {"bad.0.jpg": png(1), "bad.1.jpg": png(2)},
    "no json ": {"bad.npy": b"x"},
    "no json  ": {"bad.0.jpg": png(1)},
    "no json   ": {"bad.jpg": png(1), "bad.png": png(2)},
    "text is not UTF-8": {"bad.txt": b"\xe9"},
    "txt too large": {"bad.txt": b" " * (2**24 + 1)},
    "a multi-frame TIFF is not supported": document("bad", {"texts": [None], "images": ["page_0"]}, tiff=b"II*\0"),
    "path leaves the tar": {"../../etc/passwd.txt": b"x"},
    "path leaves the tar ": {"/etc/passwd.txt": b"x"},
}


@pytest.mark.parametrize("reason", BAD_RECORDS)
def test_a_record_that_makes_no_document_is_counted(tmp_path, reason):
    extra = BAD_RECORDS[reason]
    write_tar(tmp_path / "a.tar", page(1), extra, page(3))
    documents, account = read(tmp_path)
    expected = [whole(1), whole(2), whole(3)] if "0002.json" in extra else [whole(1), whole(3)]
    assert [shape(document) for document in documents] == expected
    assert account.bad == {reason.strip(): 1} and not account.skipped
    with pytest.raises(UserError, match=f"a.tar/.*{reason.strip()}"):
        read(tmp_path, on_bad="fail")


BAD_PICTURES = {
    "missing picture": document("bad", ONE),
    "missing picture ": document("bad", {"texts": ["words", None], "images": [None, "json"]}),
    "picture of too many bytes": document("bad", ONE, **{"0_jpg": bytes(8_000_000 + 2**20 + 1)}),
    "too many pixels": document("bad", ONE, **{"0_jpg": huge_png()}),
    "empty file": document("bad", ONE, **{"0_jpg": b""}),
    "not a PNG, JPEG or WebP picture": document("bad", ONE, **{"0_jpg": b"GIF89a"}),
    "truncated picture": document("bad", ONE, **{"0_jpg": half_jpeg()}),
}


@pytest.mark.parametrize("reason", BAD_PICTURES)
@pytest.mark.parametrize("on_bad", ["drop_image", "skip", "fail"])
def test_a_bad_picture_does_what_on_bad_says(tmp_path, reason, on_bad):
    write_tar(tmp_path / "a.tar", page(1), BAD_PICTURES[reason], page(3))
    if on_bad == "fail":
        with pytest.raises(UserError, match=r"^a.tar/bad\.(0.jpg|json): "):
            read(tmp_path, on_bad=on_bad, max_pixels=1_000_000)
        return
    documents, account = read(tmp_path, on_bad=on_bad, max_pixels=1_000_000)
    dropped = [["words"]] if on_bad == "drop_image" else []
    assert [shape(document) for document in documents] == [whole(1), *dropped, whole(3)]
    assert account.bad == {reason.strip(): 1}
    assert account.skipped == ({} if dropped else {"document with a bad picture": 1})


def test_members_that_belong_to_no_document_are_counted(tmp_path):
    link, folder = tarfile.TarInfo("0001.9.png"), tarfile.TarInfo("folder.d")
    link.type, link.linkname, folder.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.DIRTYPE
    one = {**page(1), "0001.7.PNG": png(7), "0001.txt": b"x", "0001.cls": b"3"}
    documents, account = read(write_tar(tmp_path / "a.tar", one, link, folder, {"README": b"x", ".hidden": b"x"}))
    assert [shape(document) for document in documents] == [whole(1)]
    assert account.bad == {"picture that no json names": 1, "not a regular file": 1}
    assert account.skipped == {"member that is not needed": 2, "name without a key": 2}
    assert account.examples["picture that no json names"] == "a.tar/0001.7.png"


def test_meta_of_a_stranger_can_be_stored_and_chooses_no_other_side(tmp_path):
    content = b'{"texts": ["a\\ud800"], "url": "u\\ud800"'
    content += b', "meta": {"split": "test", "x": [NaN, 1e999, "\\udfff", {"y": 1}]}}'
    documents, _ = read(write_tar(tmp_path / "a.tar", {"k.json": content}))
    assert documents[0].texts == ["a?"]
    assert documents[0].meta == {"path": "a.tar/k", "url": "u?", "x": [None, None, "?", {"y": 1}]}


def headers(content: bytes) -> list[int]:
    return [at for at in range(0, len(content), BLOCK) if content[at + 257 : at + 262] == b"ustar"]


def test_a_tar_cut_anywhere_delivers_what_is_whole_and_names_the_cut(tmp_path):
    path = write_tar(tmp_path / "a.tar", *(page(n) for n in range(4)))
    content = path.read_bytes()
    starts = headers(content)
    ends = [starts[3 * n + 2] + 2 * BLOCK for n in range(4)]  # every member fits into a block
    for boundary in range(0, len(content), BLOCK):
        for cut in {boundary, boundary + 100}:
            path.write_bytes(content[:cut])
            documents, account = read(path)
            assert [shape(document) for document in documents] == [whole(n) for n in range(4) if cut >= ends[n]]
            is_damaged = cut < ends[-1] + 2 * BLOCK
            assert account.bad["damaged tar"] == is_damaged
            # Of a document whose first member was whole something is known: it is counted on its own.
            seen = sum(cut >= starts[3 * n] + 2 * BLOCK for n in range(4))
            assert len(documents) + account.bad["document cut off by a damaged tar"] == seen


def test_a_cut_behind_a_text_may_have_cost_its_json(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"1.txt": b"one", "2.txt": b"two", "2.json": b"{}"})
    path.write_bytes(path.read_bytes()[: 4 * BLOCK])
    documents, account = read(path)
    assert [shape(document) for document in documents] == [["one"]]
    assert account.bad == {"damaged tar": 1, "document cut off by a damaged tar": 1}


def test_a_flipped_byte_in_any_header_is_named_and_costs_nothing_before_it(tmp_path):
    path = write_tar(tmp_path / "a.tar", *(page(n) for n in range(4)))
    content = path.read_bytes()
    for number, offset in enumerate(headers(content)):
        for place in (0, 107, 130, 148, 156, 257, 511):
            flipped = bytearray(content)
            flipped[offset + place] ^= 0xFF
            path.write_bytes(flipped)
            documents, account = read(path)
            assert [shape(document) for document in documents] == [whole(n) for n in range(number // 3)]
            assert account.bad["damaged tar"] == 1 and account.examples["damaged tar"].startswith("a.tar, ")
            assert account.bad["document cut off by a damaged tar"] == (number % 3 > 0)


def test_a_document_of_one_large_picture_many_times_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mmtrain.documents.interleaved.LARGEST_DOCUMENT_BYTES", 10 * len(png(1)))
    many = document("many", {"images": ["0.png"] * 11}, **{"0_png": png(1)})
    documents, account = read(write_tar(tmp_path / "a.tar", many, page(1)))
    assert [shape(document) for document in documents] == [whole(1)]
    assert account.bad == {"document too large": 1}


def test_members_nobody_needs_are_never_in_memory(tmp_path):
    large = {"0001.9.png": bytes(30 * 2**20), "0001.json": b'{"texts": ["a"]}', "0001.cls": bytes(30 * 2**20)}
    path = write_tar(tmp_path / "a.tar", large)
    del large
    tracemalloc.start()
    documents, account = read(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [d.texts for d in documents] == [["a"]] and account.bad["picture that no json names"] == 1
    assert peak_bytes < 10 * 2**20


def test_what_cannot_be_opened_is_counted_or_one_sentence(tmp_path):
    for path, says in ((None, "no corpus.path"), (tmp_path / "x", "does not exist"), (tmp_path, "holds no .tar")):
        with pytest.raises(UserError, match=says):
            WebDataset(CorpusConfig(path=path and str(path)), Path()).partitions(Account())
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.tar").symlink_to(write_tar(tmp_path / "outside.tar", page(1)))
    with pytest.raises(UserError, match=r"that can be read: 1 x path leaves the folder \(first: link.tar\)"):
        read(inside)
    (inside / "folder").symlink_to(tmp_path)
    (inside / "d.tar").mkdir()
    (inside / ".git").mkdir()
    write_tar(inside / "a.TAR", page(1))
    (inside / ".hidden.tar").write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(inside) + b"/\xff.tar")).write_bytes(b"x")
    documents, account = read(inside)
    assert len(documents) == 1
    assert account.bad == {"path leaves the folder": 1, "file name that is not UTF-8": 1}
    assert account.skipped == {"link to a folder": 1, "hidden folder": 1, "hidden file": 1}
    corpus = WebDataset(CorpusConfig(path=str(inside)), Path())
    partitions = corpus.partitions(Account())
    (inside / "a.TAR").unlink()
    assert not list(corpus.documents(partitions[0], account := Account())) and account.bad == {"unreadable file": 1}

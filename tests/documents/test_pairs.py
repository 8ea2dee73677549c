"""A user's own pictures: the three ways to write captions, and everything that can be wrong with them."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from mmtrain.config import CorpusConfig, UserError
from mmtrain.documents import Account, decode_square, encode_png, judge, read_corpus


def png(number: int) -> bytes:
    return encode_png(np.full((4, 4, 3), number, dtype=np.uint8))


def write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def folder_of(root: Path, count: int = 8) -> Path:
    for number in range(count):
        write(root / f"sub{number % 2}/p{number}.png", png(number))
        write(root / f"sub{number % 2}/p{number}.txt", f"picture\n {number} \n")
    return root


def read(path: Path | str, **options):
    config, account = CorpusConfig(name="mine", kind="pairs", path=str(path), **options), Account()
    documents = list(read_corpus(config, Path(path), account))
    judge(account, len(documents), config)
    return documents, account


def sentence(path: Path | str, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_gives_each_picture_with_its_caption(tmp_path):
    documents = read(folder_of(tmp_path))[0]
    shown = {document.texts[0]: int(decode_square(document.images[0].data, 4)[0, 0, 0]) for document in documents}
    assert shown == {f"picture {number}": number for number in range(8)}
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", document.id) for document in documents)
    assert len({document.id for document in documents}) == 8


def test_ids_stay_when_pictures_are_added_and_a_prefix_is_a_sample(tmp_path):
    before = [document.id for document in read(folder_of(tmp_path, 30))[0]]
    after = [document.id for document in read(folder_of(tmp_path, 40))[0]]
    assert [document_id for document_id in after if document_id in before] == before
    assert {document.meta["path"][:4] for document in read(tmp_path)[0][:10]} == {"sub0", "sub1"}


@pytest.mark.parametrize("columns", [("image", "caption"), ("file_name", "text")])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_table_of_captions(tmp_path, columns, kind):
    folder_of(tmp_path / "img", 3)
    rows = [(f"img/sub{n % 2}/p{n}.png", f'caption, "{n}"') for n in range(3)] + [("./img/sub0/p0.png", "again")]
    table = tmp_path / f"captions.{kind}"
    with open(table, "w", encoding="utf-8-sig", newline="") as file:
        if kind == "csv":
            csv.writer(file).writerows([columns, *rows])
        else:
            file.writelines(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
    for path in (table, tmp_path):
        documents = read(path)[0]
        assert sorted(d.texts[0] for d in documents) == ["again", *(f'caption, "{n}"' for n in range(3))]
        assert len({document.id for document in documents}) == 4
        assert len({document.meta["path"] for document in documents}) == 3


def test_bad_entries_are_counted_and_named(tmp_path):
    folder_of(tmp_path, 20)
    write(tmp_path / "huge.png", encode_png(np.zeros((20, 20, 3), dtype=np.uint8)))
    write(tmp_path / "cut.png", png(99)[:-30])
    write(tmp_path / "page.jpg", "<html>")
    write(tmp_path / "zero.webp", "")
    write(tmp_path / "empty.png", png(60))
    write(tmp_path / "latin.png", png(61))
    write(tmp_path / "alone.png", png(62))
    for name in ("huge", "cut", "page", "zero"):
        write(tmp_path / f"{name}.txt", "a caption")
    write(tmp_path / "empty.txt", " \n")
    write(tmp_path / "latin.txt", "é".encode("latin-1"))
    os.symlink("/etc/hostname", tmp_path / "link.txt")
    write(tmp_path / "link.png", png(63))
    os.mkfifo(tmp_path / "pipe.png")
    write(tmp_path / "pipe.txt", "a pipe")
    write(tmp_path / "notes.txt", "of no picture")
    write(tmp_path / ".hidden.png", png(64))
    write(tmp_path / ".cache/a.png", png(65))
    os.symlink(tmp_path / "sub0", tmp_path / "again")
    documents, account = read(tmp_path, max_pixels=100, max_bad_fraction=0.9)
    assert len(documents) == 20
    named = dict(account.examples)
    assert "cut.png" in (named.pop("truncated picture", None), named.pop("unreadable picture", None))
    assert named == {
        "too many pixels": "huge.png",
        "not a PNG, JPEG or WebP picture": "page.jpg",
        "empty file": "zero.webp",
        "empty caption": "empty.png",
        "caption is not UTF-8": "latin.png",
        "no .txt beside it": "alone.png",
        "path leaves the folder": "link.png",
        "unreadable file": "pipe.png",
        "no picture beside it": "notes.txt",
        "hidden file": ".hidden.png",
        "hidden folder": ".cache",
        "link to a folder": "again",
    }
    assert account.bad.total() == 9 and account.skipped.total() == 4
    assert "max_bad_fraction" in sentence(tmp_path, max_pixels=100)


def test_table_paths_may_not_leave_its_folder(tmp_path):
    folder_of(tmp_path / "inside", 6)
    write(tmp_path / "secret.png", png(200))
    rows = [{"image": f"sub{n % 2}/p{n}.png", "caption": "fine"} for n in range(6)]
    names = ["../secret.png", str(tmp_path / "secret.png"), "sub0/../../secret.png", "a\0.png", "\ud800.png"]
    names += ["link/../../secret.png", "link.png"]
    rows += [{"image": name, "caption": "stolen"} for name in names]
    write(tmp_path / "inside/all.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n{broken\n[1]\n{}\n")
    os.makedirs(tmp_path / "inside/deep/er")
    os.symlink("deep/er", tmp_path / "inside/link")
    os.symlink("../secret.png", tmp_path / "inside/link.png")
    documents, account = read(tmp_path / "inside/all.jsonl", max_bad_fraction=1.0)
    assert [document.texts[0] for document in documents] == ["fine"] * 6
    assert account.bad == {
        "path leaves the folder": len(names),
        "line is no JSON object": 2,
        "row without picture or caption": 1,
    }


def test_nothing_to_read_is_one_sentence(tmp_path):
    assert "does not exist" in sentence(tmp_path / "missing")
    assert "holds no pictures" in sentence(tmp_path)
    write(tmp_path / "notes.md", "x")
    assert "neither a folder nor" in sentence(tmp_path / "notes.md")
    write(tmp_path / "t.csv", "picture,words\na.png,b\n")
    assert "has no column image or file_name" in sentence(tmp_path / "t.csv")
    write(tmp_path / "t.jsonl", "")
    assert "lists no pictures" in sentence(tmp_path / "t.jsonl")
    write(tmp_path / "u.jsonl", b"\xff\xfe\x00")
    assert "not UTF-8" in sentence(tmp_path / "u.jsonl")
    write(tmp_path / "bad/a.png", b"no picture")
    write(tmp_path / "bad/a.txt", "caption")
    assert "no usable document" in sentence(tmp_path / "bad")


def test_name_that_is_not_text_can_be_stored(tmp_path):
    folder_of(tmp_path, 2)
    for suffix in (b".png", b".txt"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff" + suffix)).write_bytes(
            png(9) if suffix == b".png" else b"x"
        )
    documents = read(tmp_path)[0]
    assert len(documents) == 3
    json.dumps([document.meta for document in documents], ensure_ascii=False).encode()

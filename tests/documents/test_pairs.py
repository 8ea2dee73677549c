"""A user's own pictures: the three ways to write captions, and everything that can be wrong with them."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.config import CorpusConfig, UserError
from mmtrain.documents import decode_square, encode_png, read_corpus
from mmtrain.documents.held_out import held_out_pictures


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


def read(path: Path | str, split: str = "train", **options):
    config = CorpusConfig(name="mine", kind="pairs", path=str(path), **options)
    reading = read_corpus(config, split, Path(path))
    return list(reading), reading


def both(path: Path, **options):
    return read(path, **options)[0] + read(path, "validation", **options)[0]


def sentence(path: Path | str, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_gives_each_picture_with_its_caption(tmp_path):
    documents = both(folder_of(tmp_path))
    shown = {document.texts[0]: int(decode_square(document.images[0].data, 4)[0, 0, 0]) for document in documents}
    assert shown == {f"picture {number}": number for number in range(8)}
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", document.id) for document in documents)
    assert len({document.id for document in documents}) == 8


def test_ids_and_sides_stay_when_pictures_are_added(tmp_path):
    folder_of(tmp_path, 30)
    before = {s: {d.id for d in read(tmp_path, s, validation_fraction=0.3)[0]} for s in ("train", "validation")}
    folder_of(tmp_path, 40)
    after = {s: {d.id for d in read(tmp_path, s, validation_fraction=0.3)[0]} for s in ("train", "validation")}
    assert before["train"] and before["train"] < after["train"]
    assert before["validation"] and before["validation"] < after["validation"]


def test_same_picture_under_two_names_is_on_one_side(tmp_path):
    folder_of(tmp_path, 20)
    for number in range(20):
        write(tmp_path / f"copy{number}.png", png(number))
        write(tmp_path / f"copy{number}.txt", "copy")
    train, validation = (
        {d.images[0].sha256 for d in read(tmp_path, split, validation_fraction=0.4)[0]}
        for split in ("train", "validation")
    )
    assert train and validation and not train & validation


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
        documents = both(path)
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
    documents, reading = read(tmp_path, max_pixels=100, max_bad_fraction=0.9, validation_fraction=0.0)
    assert len(documents) == 19  # one is held out all the same
    named = dict(reading.examples)
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
    }
    assert sum(reading.skipped.values()) == 9
    assert "max_bad_fraction" in sentence(tmp_path, max_pixels=100)


def test_table_paths_may_not_leave_its_folder(tmp_path):
    folder_of(tmp_path / "inside", 6)
    write(tmp_path / "secret.png", png(200))
    rows = [{"image": f"sub{n % 2}/p{n}.png", "caption": "fine"} for n in range(6)]
    names = ["../secret.png", str(tmp_path / "secret.png"), "sub0/../../secret.png", "a\0.png", "\ud800.png"]
    rows += [{"image": name, "caption": "stolen"} for name in names]
    write(tmp_path / "inside/all.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n{broken\n[1]\n{}\n")
    documents = both(tmp_path / "inside/all.jsonl", max_bad_fraction=1.0)
    assert [document.texts[0] for document in documents] == ["fine"] * 6
    reading = read(tmp_path / "inside/all.jsonl", max_bad_fraction=1.0)[1]
    assert reading.skipped == {
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
    assert "no usable captioned picture" in sentence(tmp_path / "bad")


def test_max_documents_stops_each_split(tmp_path):
    folder_of(tmp_path, 20)
    assert len(read(tmp_path, max_documents=5)[0]) == 5


def test_name_that_is_not_text_can_be_stored(tmp_path):
    folder_of(tmp_path, 2)
    for suffix in (b".png", b".txt"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff" + suffix)).write_bytes(
            png(9) if suffix == b".png" else b"x"
        )
    documents = both(tmp_path)
    assert len(documents) == 3
    json.dumps([document.meta for document in documents], ensure_ascii=False).encode()


@given(st.sets(st.integers(0, 2**256 - 1), max_size=12), st.floats(0, 0.9), st.randoms())
@settings(max_examples=200, deadline=None)
def test_two_good_pictures_are_enough_for_both_sides(values, fraction, random):
    hashes = [f"{value:064x}" for value in values]
    good = {value for value in hashes if random.random() < 0.5}
    held_out = held_out_pictures(hashes, fraction, good.__contains__)
    assert held_out <= set(hashes)
    assert bool(good - held_out) == (len(good) >= 1)
    assert bool(good & held_out) == (len(good) >= 2)

"""What holds for every reader: partitions are plain, can be read alone, and nothing goes missing between them."""

import csv
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mmtrain.config import CorpusConfig, UserError
from mmtrain.documents import Account, Corpus, Document, encode_png, judge, open_corpus
from mmtrain.documents.registry import CORPORA, READERS

NUM_PICTURES = 8


def png(number: int) -> bytes:
    return encode_png(np.full((4, 4, 3), number, dtype=np.uint8))


def pairs(root: Path) -> dict:
    """Eight good pictures, one cut, one without caption, one caption without a picture."""
    for number in range(NUM_PICTURES + 2):
        data = png(number)
        (root / f"{number} ü%.png").write_bytes(data[:-30] if number == NUM_PICTURES else data)
        (root / f"{number} ü%.txt").write_text(f"picture {number}")
    Path(os.fsdecode(os.fsencode(root) + b"/odd\xff.png")).write_bytes(png(90))
    (root / f"{NUM_PICTURES + 1} ü%.txt").rename(root / "other.txt")
    return {"kind": "pairs", "documents": NUM_PICTURES, "skipped": 1, "bad": 3}


def table(root: Path) -> dict:
    """Three captions of each picture, of which one is bad and one is missing, and two bad rows."""
    pairs(root)
    names = [f"{number} ü%.png" for number in range(NUM_PICTURES + 1)] + ["gone.png"]
    rows = [(name, f"{name} {i}") for i in range(3) for name in names] + [("../a.png", "x"), (names[0], "")]
    with open(root / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return {"kind": "pairs", "documents": 3 * NUM_PICTURES, "skipped": 0, "bad": 2 * 3 + 2}


def stamps(root: Path) -> dict:
    """Captions in two languages, one missing; one picture is cut, one has no caption, one is mirrored."""
    folder = root / "stamps/animals"
    folder.mkdir(parents=True)
    for number in range(NUM_PICTURES + 2):
        data = png(number)
        (folder / f"{number}.png").write_bytes(data[:-30] if number == NUM_PICTURES else data)
        (folder / f"{number}.txt").write_text(f"Picture {number}\nde.utf8=Bild {number}\n")
    (folder / "0.txt").write_text("Picture 0\n")
    (folder / f"{NUM_PICTURES + 1}.txt").unlink()
    (folder / "1_mirror.png").write_bytes(png(1))
    return {"kind": "stamps", "languages": ["en", "de"], "documents": 2 * NUM_PICTURES - 1, "skipped": 2, "bad": 3}


def img2dataset(root: Path) -> dict:
    """Three tars; in each one picture is cut, one failed and two are missing. One tar more is a pipe."""
    for shard in range(3):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for number in range(NUM_PICTURES + 2):
                data = png(number)
                members = {".png": data[:-30] if number == NUM_PICTURES else data, ".txt": b"a picture"}
                if number > NUM_PICTURES:
                    members = {".json": b'{"status": "failed_to_download"}'}
                for suffix, content in members.items():
                    header = tarfile.TarInfo(f"{number:09d}{suffix}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
        (root / f"{shard:05d}_stats.json").write_text(json.dumps({"successes": NUM_PICTURES + 3}))
    os.mkfifo(root / "pipe.tar")
    return {"kind": "img2dataset", "documents": 3 * NUM_PICTURES, "skipped": 3, "bad": 3 * 3 + 1}


def shapes(root: Path) -> dict:
    return {"kind": "shapes", "num_documents": 8, "num_validation": 4, "documents": 12, "skipped": 0, "bad": 0}


@pytest.fixture(params=[shapes, pairs, table, stamps, img2dataset], ids=lambda make: make.__name__)
def case(request, tmp_path, monkeypatch) -> tuple[CorpusConfig, dict]:
    """A small corpus with damage, in several partitions, and what must be counted."""
    monkeypatch.setattr("mmtrain.documents.captioned.PICTURES_PER_PARTITION", 3)
    monkeypatch.setattr("mmtrain.documents.shapes.SCENES_PER_PARTITION", 3)
    facts = request.param(tmp_path)
    expected = {key: facts.pop(key) for key in ("documents", "skipped", "bad")}
    path = None if facts["kind"] == "shapes" else str(tmp_path)
    return CorpusConfig(path=path, **facts), expected


def read(corpus: Corpus, partition: dict, account: Account | None = None) -> list[Document]:
    return list(corpus.documents(partition, account or Account()))


def test_every_entry_is_delivered_or_counted(case):
    config, expected = case
    account, corpus = Account(), open_corpus(config, Path())
    documents = [document for partition in corpus.partitions(account) for document in read(corpus, partition, account)]
    counted = {"documents": len(documents), "skipped": account.skipped.total(), "bad": account.bad.total()}
    assert counted == expected, account.summary()
    assert len({document.id for document in documents}) == len(documents)
    json.dumps([d.meta for d in documents] + [account.plain()], ensure_ascii=False).encode()


def test_partitions_can_be_stored_and_read_alone_in_any_order(case):
    config, expected = case
    corpus = open_corpus(config, Path())
    partitions = corpus.partitions(Account())
    stored = [json.dumps(partition, ensure_ascii=False).encode() for partition in partitions]
    assert len(stored) > 2 and partitions == corpus.partitions(Account())
    together = [read(corpus, partition) for partition in partitions]
    alone = [read(open_corpus(config, Path()), json.loads(line)) for line in reversed(stored)]
    assert alone[::-1] == together and sum(map(len, together)) == expected["documents"]


def test_files_that_vanish_in_between_are_counted(case, tmp_path):
    config, expected = case
    if config.kind == "shapes":
        return  # it reads no files
    corpus = open_corpus(config, Path())
    partitions = corpus.partitions(Account())
    for path in tmp_path.rglob("*.*"):
        if path.suffix in (".png", ".tar"):
            path.unlink()
    account = Account()
    assert [document for partition in partitions for document in read(corpus, partition, account)] == []
    assert account.bad.keys() <= {"missing file", "unreadable file"} and account.bad.total() >= len(partitions)


def test_damage_stops_at_once_where_it_should(case):
    config, expected = case
    account, corpus = Account("fail"), open_corpus(config, Path())
    if expected["bad"]:
        with pytest.raises(UserError, match=r"on_bad=skip"):
            [read(corpus, partition, account) for partition in corpus.partitions(account)]


def test_too_much_damage_is_an_error_at_the_end():
    config, account = CorpusConfig(name="mine", path="there", max_bad_fraction=0.25), Account()
    account.skip("failed download", "a", 1000)
    account.spoil("empty file", "b.png", 5)
    judge(account, 15, config)
    with pytest.raises(UserError, match=r"^corpus mine \(there\): 5 of 19 entries .*max_bad_fraction=0.25.*empty file"):
        judge(account, 14, config)
    with pytest.raises(UserError, match=r"no usable document: .*5 x empty file \(first: b.png\)"):
        judge(account, 0, config)
    with pytest.raises(UserError, match=r"no usable document: nothing was found\.$"):
        judge(Account(), 0, config)


def test_unknown_kind_names_the_known_ones():
    assert READERS.keys() == CORPORA.keys()
    with pytest.raises(UserError, match=r"corpus.kind=paris is unknown; .*pairs"):
        open_corpus(CorpusConfig(kind="paris"), Path())

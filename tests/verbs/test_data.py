"""A user's own pictures through `mmtrain data`, good and bad."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmtrain import cli
from mmtrain.shards import DocumentShards

# The smoke experiment is for shapes; its sizes serve here.
SETTINGS = ["experiment=smoke", "corpus=pairs", "corpus.image_size=32", "corpus.validation_fraction=0.3"]
SETTINGS += ["corpus.max_pixels=10000", "image_tokenizer.steps=2"]


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 16 captioned pictures; the current folder is an empty one beside it."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(16):
        pixels = rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture number {number}")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def data(path: Path, *more: str) -> int:
    return cli.main(["data", *SETTINGS, f"corpus.path={path}", *more])


def test_bad_pictures_among_good_ones_are_counted_named_and_left_out(pictures: Path, capsys) -> None:
    good = (pictures / "0.png").read_bytes()
    bad_files = {"nopicture": b"this is no picture", "halved": good[: len(good) // 2], "uncaptioned": good}
    for name, content in bad_files.items():
        (pictures / f"{name}.png").write_bytes(content)
        (pictures / f"{name}.txt").write_text("a caption")
    (pictures / "uncaptioned.txt").write_text("  \n")
    Image.new("RGB", (101, 100)).save(pictures / "huge.png")
    (pictures / "huge.txt").write_text("a caption")

    assert data(pictures, "corpus.max_bad_fraction=0.5") == 0
    output = capsys.readouterr().out
    (facts,) = Path("data/pairs").glob("documents-*/facts.json")
    found = json.loads(facts.read_text())
    bad, examples = found["bad"], found["examples"]
    assert {Path(name).stem for name in examples.values()} == {*bad_files, "huge"}
    assert all(count == 1 for count in bad.values())
    assert all(f"left out 1: {reason} (first: {examples[reason]})" in output for reason in bad)
    kept = [DocumentShards(facts.parent / split) for split in ("train", "validation")]
    assert sorted(document.texts[0] for shards in kept for document in shards) == sorted(
        f"picture number {number}" for number in range(16)
    )


def test_too_many_bad_pictures_stop_the_work(pictures: Path, capsys) -> None:
    for number in range(10):
        (pictures / f"{number}.png").write_bytes(b"nothing %d" % number)
    assert data(pictures) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmtrain: ") and error.count("\n") == 1 and "max_bad_fraction" in error
    assert not list(Path("data/pairs").glob("documents-*"))


def test_a_missing_folder_is_a_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert data(tmp_path / "nowhere") == 2
    assert capsys.readouterr().err.splitlines() == [
        f"mmtrain: corpus.path={tmp_path / 'nowhere'} does not exist; "
        "give a folder of pictures or tars, or a captions file"
    ]


def test_a_folder_without_pictures_is_a_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a caption of nothing")
    assert data(tmp_path / "texts") == 2
    error = capsys.readouterr().err
    assert "holds no pictures" in error and error.count("\n") == 1


def test_no_path_at_all_is_a_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", *SETTINGS]) == 2
    error = capsys.readouterr().err
    assert "corpus.path is empty" in error and error.count("\n") == 1

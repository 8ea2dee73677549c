"""Retrieval through the command line: a page to look at, a join, two ways to the same batches, Ray."""

import shutil
from pathlib import Path

import pytest

from mmtrain.track import read_metrics
from tests.e2e.conftest import mmtrain

pytestmark = pytest.mark.slow
WORDS = ["experiment=smoke", "retrieval=cm3leon", "image_tokenizer.steps=2"]
RUN = ["train.steps=3", "track.wandb=disabled"]


def ok(*words: str, cwd: Path) -> str:
    done = mmtrain(*words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def curve(folder: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["data/shapes/retrieved"]) for row in read_metrics(folder / "metrics.jsonl")]


def test_look_up_and_inlined_shards_train_alike(tmp_path: Path) -> None:
    said = ok("retrieval", "inspect", "3", "page.html", *WORDS, cwd=tmp_path)
    page = (tmp_path / "page.html").read_text()
    assert "page.html" in said and page.count("<article") == 3 and page.count("<h3>by its text") == 3

    ok("train", *WORDS, *RUN, "name=looked", cwd=tmp_path)
    assert "retrieval.inlined=true" in ok("retrieval", "join", *WORDS, cwd=tmp_path)
    looked = curve(tmp_path / "runs/looked")
    assert sum(row[2] for row in looked) > 0

    # From a folder that stands for a store: ready tokens and their inlined shards.
    (tokens,), (joined,) = ((tmp_path / "data/shapes").glob(f"{kind}-*") for kind in ("tokens", "inlined"))
    (text,), (image,) = ((tmp_path / "data/shapes").glob(f"{kind}-*") for kind in ("text", "image"))
    ready = [f"corpus.tokens={tokens}", f"corpus.retrieved={joined}", f"text_tokenizer.path={text}/tokenizer.json"]
    ok("train", *WORDS, *RUN, "name=ready", *ready, f"image_tokenizer.path={image}", "data_dir=other", cwd=tmp_path)
    assert curve(tmp_path / "runs/ready") == looked
    (other,) = (tmp_path / "data/shapes").glob("documents-*")
    refused = mmtrain("train", *WORDS, *RUN, "name=bad", *ready[:1], f"corpus.retrieved={other}", *ready[2:],
                      f"image_tokenizer.path={image}", "data_dir=third", cwd=tmp_path)  # fmt: skip
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) <= 2, refused.stderr


@pytest.mark.faults  # two minutes: nothing is broken on purpose, but Ray starts and ends for every stage
def test_ray_writes_the_bytes_that_processes_write(tmp_path: Path) -> None:
    ok("retrieval", "join", *WORDS, cwd=tmp_path)
    shutil.move(tmp_path / "data", tmp_path / "by-processes")
    ok("retrieval", "join", *WORDS, "runner=ray", cwd=tmp_path)
    for kind in ("documents", "tokens", "neighbours", "inlined"):
        (expected,) = (tmp_path / "by-processes/shapes").glob(f"{kind}-*")
        found = tmp_path / "data/shapes" / expected.name
        files = sorted(path.relative_to(expected) for path in expected.rglob("*") if path.is_file())
        assert files == sorted(path.relative_to(found) for path in found.rglob("*") if path.is_file())
        assert all((expected / name).read_bytes() == (found / name).read_bytes() for name in files)

"""A corpus of several partitions with the command line that prepares it, and a small prepared corpus to look at."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmtrain import cli
from mmtrain.config import Config
from mmtrain.config.compose import compose
from mmtrain.verbs.prepared import PreparedCorpus, open_corpus

NUM_TARS, SAMPLES_PER_TAR = 5, 8
# The smoke experiment is for shapes; its sizes serve here.
SETTINGS = ["experiment=smoke", "corpus=img2dataset", "corpus.image_size=32", "corpus.validation_fraction=0.3"]
SETTINGS += ["image_tokenizer.steps=2", "data.shard_bytes=20000", "data.shard_documents=10"]


def write_tar(path: Path, number: int) -> None:
    """Samples of small noise pictures with short captions, as img2dataset lays them out."""
    rng = np.random.default_rng(number)
    with tarfile.open(path, "w") as tar:
        for sample in range(SAMPLES_PER_TAR):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(picture, "PNG")
            for suffix, data in (("png", picture.getvalue()), ("txt", b"picture %d of tar %d" % (sample, number))):
                member = tarfile.TarInfo(f"{number:05d}{sample:04d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="session")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tars, one partition each."""
    folder = tmp_path_factory.mktemp("tars")
    for number in range(NUM_TARS):
        write_tar(folder / f"{number:05d}.tar", number)
    return folder


def data(*words: str, path: Path, cwd: Path) -> int:
    """`mmtrain data WORDS` on the tars in `path`, run in the folder `cwd`; its exit code."""
    cwd.mkdir(exist_ok=True)
    before = Path.cwd()
    os.chdir(cwd)
    try:
        steps = [word for word in words if "=" not in word]
        return cli.main(["data", *steps, *SETTINGS, f"corpus.path={path}", *(w for w in words if "=" in w)])
    finally:
        os.chdir(before)


def artifacts(cwd: Path) -> dict[str, bytes]:
    """Every file of the documents and tokens that were built in `cwd`; nothing else may be left beside them."""
    folder = cwd / "data" / "img2dataset"
    assert [path.name for path in folder.glob(".*")] == []
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name.startswith(("documents", "tokens"))}


@pytest.fixture(scope="session")
def undisturbed(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which one process built and tokenized the tars without interruption."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    assert data("data.processes=1", path=tars, cwd=cwd) == 0
    return cwd


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, PreparedCorpus]:
    """64 training and 16 validation scenes with tokens and neighbours, and their configuration."""
    folder = tmp_path_factory.mktemp("data")
    config = compose(["experiment=smoke", "image_tokenizer.steps=2", f"data_dir={folder}"])
    return config, open_corpus(config, with_neighbours=True)

"""The corpora by name."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from mmtrain.config import CorpusConfig, UserError
from mmtrain.documents.corpus import Account, Corpus
from mmtrain.documents.document import Document

CORPORA: dict[str, str] = {
    "shapes": "procedural scenes of 1-3 colored shapes with captions, questions and exact ground truth; no download",
    "stamps": "about 1,000 captioned pictures of Debian's tuxpaint-stamps-default, in up to 60 languages; needs apt",
    "pairs": "your own folder of pictures with captions in .txt files, a .jsonl or a .csv",
    "img2dataset": "the tars that img2dataset writes, read from front to back; nothing is unpacked",
    "mmc4": "MMC4's .jsonl of pages, their pictures put back among the sentences, and a folder of pictures",
    "parquet": "Parquet tables of interleaved pages or of captioned pictures, as on Hugging Face",
    "webdataset": "webdataset tars of captioned pictures or interleaved documents",
    "html": "a folder of HTML pages with their pictures, or a Debian package of such pages",
}
# Each in mmtrain/documents/KIND.py, imported when it is asked for: drawing scenes must not need pyarrow.
READERS: dict[str, str] = {
    "shapes": "Shapes",
    "stamps": "Stamps",
    "pairs": "Pairs",
    "img2dataset": "Img2Dataset",
    "mmc4": "Mmc4",
    "parquet": "Parquet",
    "webdataset": "WebDataset",
    "html": "Html",
}


def open_corpus(config: CorpusConfig, cache: Path) -> Corpus:
    """The reader of config.kind; `cache` is a folder that keeps downloads. Nothing is read yet."""
    if config.kind not in READERS:
        raise UserError(f"corpus.kind={config.kind} is unknown; choose one of {', '.join(CORPORA)}.")
    reader: type[Corpus] = getattr(import_module(f"mmtrain.documents.{config.kind}"), READERS[config.kind])
    return reader(config, cache)


def read_corpus(config: CorpusConfig, cache: Path, account: Account | None = None) -> Iterator[Document]:
    """Every document of a corpus, partition after partition, in this process."""
    account = account or Account(config.on_bad)
    corpus = open_corpus(config, cache)
    for partition in corpus.partitions(account):
        yield from corpus.documents(partition, account)

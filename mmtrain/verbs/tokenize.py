"""`mmtrain data tokenize`: document shards become token shards, in partitions that outlive a crash."""

import json
import multiprocessing
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from mmtrain.config import Config
from mmtrain.documents import Document, decode_square
from mmtrain.shards import DocumentShards, Manifest, ShardInfo, finish_tokens, seal, write_token_shard
from mmtrain.tokens import ImageTokenizer, TextTokenizer, TokenDocument, Vocabulary, document_to_tokens
from mmtrain.verbs.build import SPLITS
from mmtrain.verbs.partitions import Result, Task, run_partitions

# Documents, and pictures, that are encoded together: enough for a GPU, few enough for memory. The codes of a picture
# may depend on the size of its batch (other kernels round otherwise), so both are fixed.
BATCH = 256


@dataclass(frozen=True)
class EncodeRange:
    """Work: documents first to stop (exclusive) of a split into a token shard."""

    documents: Path
    text: Path
    image: Path
    vocabulary: Vocabulary
    image_size: int
    out: Path
    uses_gpu: ClassVar[bool] = True

    def __call__(self, task: Task) -> Result:
        shards = open_documents(self.documents / task["split"])
        text, image = _open_tokenizers(self.text, self.image)
        num_images = 0

        def encoded() -> Iterator[TokenDocument]:
            nonlocal num_images
            for batch in _batches(shards[i] for i in range(task["first"], task["stop"])):
                pictures = [decode_square(p.data, self.image_size) for document in batch for p in document.images]
                codes = iter(image.encode(np.stack(pictures))) if pictures else iter(())
                num_images += len(pictures)
                for document in batch:
                    of_document = [next(codes) for _ in document.images]
                    yield document_to_tokens(document, text, of_document, self.vocabulary)

        shard = write_token_shard(self.out / task["split"], task["number"], encoded(), self.vocabulary)
        return {**asdict(shard), "images": num_images}


def tokenize_documents(config: Config, documents: Path, text_folder: Path, image_folder: Path, out: Path) -> None:
    """Fill `out` (perhaps an interrupted build of the same) with train/, validation/, vocabulary.json, flops.json."""
    documents, text_folder, image_folder = (path.resolve() for path in (documents, text_folder, image_folder))
    text, image = _open_tokenizers(text_folder, image_folder)
    vocabulary = run_vocabulary(config, text, image)
    tasks: list[Task] = []
    for split in SPLITS:
        (out / split).mkdir(exist_ok=True)
        num_documents = len(DocumentShards(documents / split))
        for number, first in enumerate(range(0, num_documents, config.data.shard_documents)):
            stop = min(first + config.data.shard_documents, num_documents)
            tasks.append({"split": split, "number": number, "first": first, "stop": stop})
    encode = EncodeRange(documents, text_folder, image_folder, vocabulary, image.image_size, out)
    label, processes = f"tokenizing {documents.parent.name}", config.data.processes
    results = run_partitions(encode, tasks, out / ".work", label, processes, runner=config.runner)
    num_images = sum(result.pop("images") for result in results)
    for split in SPLITS:
        shards = [ShardInfo(**result) for result, task in zip(results, tasks, strict=True) if task["split"] == split]
        made_of = {"documents": Manifest.load(documents / split).fingerprint}
        finish_tokens(out / split, shards, vocabulary, text.fingerprint, image.fingerprint, made_of)
    vocabulary.save(out / "vocabulary.json")
    flops = {"image_tokenizer_encode": num_images * image.encode_flops_per_image}
    (out / "flops.json").write_text(json.dumps(flops))
    seal(out)
    shutil.rmtree(out / ".work")


def run_vocabulary(config: Config, text: TextTokenizer, image: ImageTokenizer) -> Vocabulary:
    """The id space of a run."""
    return Vocabulary(text.size, image.num_codes, config.objective.num_sentinels)


@lru_cache(maxsize=2)
def open_documents(folder: Path) -> DocumentShards:
    """Opened once per process."""
    return DocumentShards(folder)


@lru_cache(maxsize=2)
def _open_tokenizers(text: Path, image: Path) -> tuple[TextTokenizer, ImageTokenizer]:
    return TextTokenizer.load(text / "tokenizer.json"), open_image_tokenizer(image)


@lru_cache(maxsize=2)
def open_image_tokenizer(image: Path) -> ImageTokenizer:
    """On this process's device, loaded once per process."""
    return ImageTokenizer.load(image).to(device())


def device() -> str:
    """The GPU of this process: processes share all that there are."""
    if not torch.cuda.is_available():
        return "cpu"
    number = re.search(r"\d+$", multiprocessing.current_process().name)  # "ForkServerProcess-3"
    return f"cuda:{int(number[0]) % torch.cuda.device_count() if number else 0}"


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_pictures = 0
    for document in documents:
        batch.append(document)
        num_pictures += len(document.images)
        if len(batch) == BATCH or num_pictures >= BATCH:
            yield batch
            batch, num_pictures = [], 0
    if batch:
        yield batch

"""Latents and captions for the diffusion baseline, from document and token shards, in partitions that outlive a crash."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from mmtrain.config import Config, UserError
from mmtrain.diffusion.pictures import STATISTICS
from mmtrain.documents import decode_square
from mmtrain.shards import TokenShards
from mmtrain.tokens import ImageTokenizer
from mmtrain.verbs.build import SPLITS
from mmtrain.verbs.partitions import Result, Task, run_partitions
from mmtrain.verbs.progress import Bar
from mmtrain.verbs.tokenize import BATCH, open_documents, open_image_tokenizer

ROWS = 1 << 16  # of latents that are averaged at a time


@dataclass(frozen=True)
class EncodeLatents:
    """Work: the pictures of documents first to stop (exclusive) of a split, into their rows of latents.npy."""

    documents: Path
    image: Path
    out: Path
    uses_gpu: ClassVar[bool] = True

    def __call__(self, task: Task) -> Result:
        shards, image = open_documents(self.documents / task["split"]), open_image_tokenizer(self.image)
        latents = np.lib.format.open_memmap(self.out / task["split"] / "latents.npy", mode="r+")
        for start in range(task["first"], task["stop"], BATCH):
            numbers = range(start, min(start + BATCH, task["stop"]))
            pictures = [decode_square(shards[i].images[0].data, image.image_size) for i in numbers]
            latents[numbers.start : numbers.stop] = image.latents(np.stack(pictures))
        latents.flush()
        return {"documents": task["stop"] - task["first"]}


def encode_pictures(config: Config, documents: Path, tokens: Path, image_folder: Path, out: Path) -> None:
    """Fill `out` (perhaps an interrupted build of the same) with what `diffusion.Pictures` reads, and flops.json.

    Raises UserError for a document that is not one caption and one picture.
    """
    image = ImageTokenizer.load(image_folder)
    shape = (image.latent_dim, image.grid, image.grid)
    tasks: list[Task] = []
    for split in SPLITS:
        (out / split).mkdir(exist_ok=True)
        num_documents = _captions(TokenShards(tokens / split), f"{tokens.parent.name}/{split}", out / split)
        if not (out / split / "latents.npy").exists():
            np.lib.format.open_memmap(out / split / "latents.npy", "w+", np.float16, (num_documents, *shape))
        for first in range(0, num_documents, config.data.shard_documents):
            stop = min(first + config.data.shard_documents, num_documents)
            tasks.append({"split": split, "first": first, "stop": stop})
    encode = EncodeLatents(documents.resolve(), image_folder.resolve(), out.resolve())
    label = f"latents of {documents.parent.name}"
    done = run_partitions(encode, tasks, out / ".work", label, config.data.processes, runner=config.runner)
    mean, std = _statistics(np.load(out / "train" / "latents.npy", mmap_mode="r"))
    (out / STATISTICS).write_text(json.dumps({"mean": mean.tolist(), "std": std.tolist()}))
    flops = {"image_tokenizer_encode": sum(r["documents"] for r in done) * image.encode_flops_per_image}
    (out / "flops.json").write_text(json.dumps(flops))
    shutil.rmtree(out / ".work")


def _captions(shards: TokenShards, where: str, out: Path) -> int:
    """Write captions.npy and starts.npy of a split; returns its number of documents."""
    vocabulary, captions = shards.vocabulary, []
    with Bar(f"captions of {where}", len(shards)) as advance:
        for i in range(len(shards)):
            segments = shards.segments(i)
            if sorted(segment.kind for segment in segments) != ["image", "text"]:
                held = ", ".join(segment.kind for segment in segments) or "nothing"
                raise UserError(
                    f"model.family=dit learns pictures with one caption each, and document {shards.id(i)} of {where} holds "
                    f"{held}; use a corpus of captioned pictures, or a model of tokens"
                )
            (text,) = (segment for segment in segments if segment.kind == "text")
            ids = shards.tokens(i)[text.start : text.start + text.length]
            captions.append(ids - vocabulary.dtype.type(vocabulary.text_start))
            advance(i + 1)
    np.save(out / "captions.npy", np.concatenate(captions))
    np.save(out / "starts.npy", np.cumsum([0, *map(len, captions)], dtype=np.int64))
    return len(shards)


def _statistics(latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, (C,) float64."""
    sums = np.zeros((2, latents.shape[1]))
    for start in range(0, len(latents), ROWS):
        part = latents[start : start + ROWS].astype(np.float64)
        sums += part.sum((0, 2, 3)), (part**2).sum((0, 2, 3))
    mean, square = sums / (latents.size // latents.shape[1])
    return mean, np.sqrt(np.maximum(square - mean**2, 1e-12))

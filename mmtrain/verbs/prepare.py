"""The chain of artifacts behind a run, each built once and found again by the fingerprint of what made it.

documents ─▶ text tokenizer ─┐
    └──────▶ image tokenizer ┴▶ token shards
    └──────▶ neighbours
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from mmtrain.config import Config, UserError, build_artifact, fingerprint
from mmtrain.documents import decode_square, read_corpus
from mmtrain.retrieval import build_neighbours
from mmtrain.shards import DocumentShards, write_documents, write_tokens
from mmtrain.tokens import (
    ImageTokenizer,
    TextTokenizer,
    TokenDocument,
    Vocabulary,
    document_to_tokens,
    train_image_tokenizer,
)
from mmtrain.train.run import Artifacts
from mmtrain.verbs.progress import Bar

T = TypeVar("T")
SPLITS = ("train", "validation")
ENCODE_BATCH = 256
FORMAT = 2  # raise when the same config gives other bytes


def prepare(config: Config) -> Artifacts:
    """Build what is missing of a run's artifacts and return their folders."""
    documents = prepare_documents(config)
    text = prepare_text_tokenizer(config, documents)
    image = prepare_image_tokenizer(config, documents)
    tokens = prepare_tokens(config, documents, text, image)
    neighbours = prepare_neighbours(config, documents)
    return Artifacts(documents, text, image, tokens, neighbours)


def prepare_documents(config: Config) -> Path:
    """Document shards of the corpus, split into train and validation."""
    corpus = asdict(config.corpus)
    if config.corpus.path:
        corpus["path"] = _path_fingerprint(config.corpus.path)
    final = _folder(config, "documents", fingerprint(FORMAT, corpus))

    def build(partial: Path) -> None:
        facts: dict[str, Any] = {"corpus": asdict(config.corpus)}
        for split in SPLITS:
            reading = read_corpus(config.corpus, split, Path(config.data_dir) / "downloads")
            with Bar(f"reading {config.corpus.name} ({split})", None) as advance:
                manifest = write_documents(partial / split, _counted(reading, advance))
            if not manifest.documents:
                raise UserError(
                    f"corpus {config.corpus.name} has no {split} document; {reading.summary() or 'add pictures'}"
                )
            facts[split] = {
                "documents": manifest.documents,
                "skipped": dict(reading.skipped),
                "examples": reading.examples,
            }
            for reason, count in reading.skipped.items():
                print(f"  skipped {count}: {reason} (first: {reading.examples[reason]})")
        (partial / "facts.json").write_text(json.dumps(facts, indent=1))

    return _timed("documents", final, build)


def prepare_text_tokenizer(config: Config, documents: Path) -> Path:
    """Folder with tokenizer.json: trained on the training documents, or the file that the config names."""
    source = config.text_tokenizer.path
    key = TextTokenizer.load(Path(source)).fingerprint if source else documents.name
    final = _folder(config, "text", fingerprint(FORMAT, config.text_tokenizer, key))

    def build(partial: Path) -> None:
        if source:
            tokenizer = TextTokenizer.load(Path(source))
        else:
            texts = (text for document in DocumentShards(documents / "train") for text in document.texts)
            tokenizer = TextTokenizer.train(texts, config.text_tokenizer)
        tokenizer.save(partial / "tokenizer.json")

    return _timed("text tokenizer", final, build)


def prepare_image_tokenizer(config: Config, documents: Path) -> Path:
    """Folder of the image tokenizer: trained on the training pictures, or the one that the config names."""
    if config.image_tokenizer.path:
        folder = Path(config.image_tokenizer.path)
        tokenizer = ImageTokenizer.load(folder)
        if tokenizer.image_size != config.corpus.image_size:
            raise UserError(
                f"image_tokenizer.path={folder} is for pictures of {tokenizer.image_size} pixels; "
                f"set corpus.image_size={tokenizer.image_size}"
            )
        return folder
    final = _folder(config, "image", fingerprint(FORMAT, config.image_tokenizer, documents.name))

    def build(partial: Path) -> None:
        train = load_pictures(documents / "train", config.corpus.image_size, config.image_tokenizer.max_images)
        held_out = load_pictures(documents / "validation", config.corpus.image_size, 256)
        if not len(train) or not len(held_out):
            raise UserError(f"corpus {config.corpus.name} has no pictures to train an image tokenizer on")
        with Bar("training the image tokenizer", config.image_tokenizer.steps) as advance:
            train_image_tokenizer(
                train, held_out, config.image_tokenizer, partial, lambda step, row: advance(step, note=_short(row))
            )

    final = _timed("image tokenizer", final, build)
    m = json.loads((final / "metrics.json").read_text())
    print(
        f"  held-out PSNR {m['psnr']:.1f} dB, SSIM {m['ssim']:.3f}, {m['codebook_used']} of {m['codebook_size']} codes "
        f"used, perplexity {m['codebook_perplexity']:.0f}"
    )
    return final


def prepare_tokens(config: Config, documents: Path, text_folder: Path, image_folder: Path) -> Path:
    """Token shards of both splits, with vocabulary.json beside them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text, image = TextTokenizer.load(text_folder / "tokenizer.json"), ImageTokenizer.load(image_folder).to(device)
    vocabulary = Vocabulary(text.size, image.num_codes, config.objective.num_sentinels)
    key = fingerprint(FORMAT, documents.name, text.fingerprint, image.fingerprint, vocabulary.fingerprint)
    final = _folder(config, "tokens", key)

    def build(partial: Path) -> None:
        vocabulary.save(partial / "vocabulary.json")
        num_images = 0
        for split in SPLITS:
            shards = DocumentShards(documents / split)
            with Bar(f"tokenizing ({split})", len(shards)) as advance:
                encoded = _counted(_encode(shards, text, image, vocabulary, config.corpus.image_size), advance)
                write_tokens(partial / split, encoded, vocabulary, text.fingerprint, image.fingerprint)
            num_images += sum(len(document.images) for document in shards)
        flops = {"image_tokenizer_encode": num_images * image.encode_flops_per_image}
        (partial / "flops.json").write_text(json.dumps(flops))

    return _timed("token shards", final, build)


def prepare_neighbours(config: Config, documents: Path) -> Path | None:
    """Neighbours of the documents of both splits among the training documents; None without retrieval."""
    if not config.retrieval.enabled:
        return None
    r = config.retrieval
    # How many of the candidates a sequence takes is decided at load time and does not change the artifact.
    key = (r.encoder, r.dimension, r.num_candidates, r.max_score, r.query_dropout)
    final = _folder(config, "neighbours", fingerprint(FORMAT, key, config.seed, documents.name))

    def build(partial: Path) -> None:
        memory = DocumentShards(documents / "train")
        build_neighbours(memory, memory, config.retrieval, partial / "train", config.seed)
        held_out = DocumentShards(documents / "validation")
        encoded = partial / "train"
        build_neighbours(memory, held_out, config.retrieval, partial / "validation", config.seed, encoded=encoded)

    return _timed("neighbours", final, build)


def load_pictures(folder: Path, image_size: int, limit: int) -> np.ndarray:
    """(N, S, S, 3) uint8: the first `limit` pictures of document shards, decoded and square."""
    pictures: list[np.ndarray] = []
    for document in DocumentShards(folder):
        pictures += [decode_square(image.data, image_size) for image in document.images]
        if len(pictures) >= limit:
            break
    return np.stack(pictures[:limit]) if pictures else np.empty((0, image_size, image_size, 3), np.uint8)


def _encode(
    shards: DocumentShards, text: TextTokenizer, image: ImageTokenizer, vocabulary: Vocabulary, image_size: int
) -> Iterator[TokenDocument]:
    for start in range(0, len(shards), ENCODE_BATCH):
        documents = [shards[i] for i in range(start, min(start + ENCODE_BATCH, len(shards)))]
        pictures = [decode_square(picture.data, image_size) for document in documents for picture in document.images]
        codes = iter(image.encode(np.stack(pictures))) if pictures else iter(())
        for document in documents:
            of_document = [next(codes) for _ in document.images]
            yield document_to_tokens(document, text, of_document, vocabulary)


def _folder(config: Config, stage: str, key: str) -> Path:
    return Path(config.data_dir) / config.corpus.name / f"{stage}-{key}"


def _path_fingerprint(path: str) -> str:
    """Identity of the user's data: names, sizes and times of the files in a folder; of a table, the table's own."""
    root = Path(path)
    if not root.exists():
        raise UserError(f"corpus.path={path} does not exist; give a folder of pictures or tars, or a captions file")
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    return fingerprint(str(root.resolve()), [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files])


def _timed(what: str, final: Path, build: Callable[[Path], None]) -> Path:
    start, existed = time.monotonic(), final.is_dir()
    build_artifact(final, build)
    print(
        f"{what}: {os.path.relpath(final)} ({'found' if existed else f'built in {time.monotonic() - start:.1f} s'})",
        flush=True,
    )
    return final


def _counted(items: Iterable[T], advance: Bar) -> Iterator[T]:
    for count, item in enumerate(items, start=1):
        yield item
        advance(count)


def _short(row: dict[str, Any]) -> str:
    return "  ".join(f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, (int, float)))

"""The chain of artifacts behind a run, each built once and found again by the fingerprint of what made it.

documents of every source ─▶ text tokenizer ─┐
    └──────▶ image tokenizer ────────────────┴▶ token shards of every source
    ├──────▶ (latents of every source, for the diffusion baseline)
    └──────▶ neighbours of every source ─▶ (inlined shards: the tokens of the neighbours)
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from mmtrain.config import Config, RetrievalConfig, UserError, build_artifact, fingerprint
from mmtrain.documents import Account, Document, decode_square, judge
from mmtrain.retrieval import build_neighbours, open_encoder
from mmtrain.retrieval.build import NEIGHBOURS
from mmtrain.retrieval.dual_training import METRICS, RANKS, train_dual
from mmtrain.shards import DocumentShards, Manifest, join_location, mirror, open_store
from mmtrain.shards.manifest import MANIFEST, VOCABULARY
from mmtrain.tokens import ImageTokenizer, TextTokenizer, train_image_tokenizer
from mmtrain.train.run import Artifacts
from mmtrain.verbs.build import SPLITS, build_documents
from mmtrain.verbs.join import join_retrieved
from mmtrain.verbs.partitions import Task, Work, run_partitions
from mmtrain.verbs.pictures import encode_pictures
from mmtrain.verbs.progress import Bar
from mmtrain.verbs.tokenize import run_vocabulary, tokenize_documents

HELD_OUT_PICTURES = 256
FORMAT = 3  # raise when the same config gives other bytes
MIX = "mix"  # the folder under data_dir of the tokenizers that several sources share
AT_LOAD_TIME = ("enabled", "num_documents", "policy", "dropout", "order", "max_tokens", "inlined", "block")
OF_DUAL = ("dimension", "dual_steps", "dual_batch", "dual_pairs", "dual_lr")
NOT_IN_BYTES = ("max_bad_fraction", "retrieved")  # settings of a corpus that change nothing that is written


def prepare(config: Config) -> Artifacts:
    """Build what is missing of a run's artifacts and return their folders."""
    documents = prepare_documents(config)
    text = prepare_text_tokenizer(config, documents)
    image = prepare_image_tokenizer(config, documents)
    tokens = prepare_tokens(config, documents, text, image)
    encoder = prepare_encoder(config, documents)
    neighbours = prepare_neighbours(config, documents, encoder)
    inlined = prepare_inlined(config, tokens, neighbours)
    pictures = prepare_pictures(config, documents, tokens, image)
    return Artifacts(documents, text, image, tokens, neighbours, inlined, pictures, encoder)


def prepare_documents(config: Config) -> dict[str, Path]:
    """Document shards of each source, split into train and validation; none of sources whose tokens are ready."""
    folders = {}
    for name, corpus in config.sources.items():
        if corpus.tokens:
            continue
        final = documents_folder(config, name)
        for other in final.parent.glob(".documents-*.partial"):
            if other.name != f".{final.name}.partial":
                print(f"  {os.path.relpath(other)} is an unfinished build of other settings or files; delete it if "
                      "you do not go on with it")  # fmt: skip
        folders[name] = _timed(f"documents of {name}", final, partial(build_documents, config, name), resumable=True)
        facts = json.loads((final / "facts.json").read_text())
        account = Account()
        account.add(facts)
        judge(account, sum(part["documents"] for part in facts["partitions"]), corpus)
    return folders


def documents_folder(config: Config, name: str) -> Path:
    """Where the document shards of a source are or will be. Raises UserError where there is nothing to read."""
    settings = {key: value for key, value in asdict(config.sources[name]).items() if key not in NOT_IN_BYTES}
    settings |= {key: _path_fingerprint(key, settings[key]) for key in ("path", "image_folder") if settings[key]}
    key = fingerprint(FORMAT, settings, config.clean, config.dedupe, config.data.shard_bytes)
    return _folder(config, name, "documents", key)


def prepare_text_tokenizer(config: Config, documents: dict[str, Path]) -> Path:
    """Folder with tokenizer.json: trained on the training documents, or the file that the config names."""
    source = config.text_tokenizer.path
    key = TextTokenizer.load(Path(source)).fingerprint if source else _names(documents)
    final = _folder(config, _corpus_name(documents), "text", fingerprint(FORMAT, config.text_tokenizer, key))

    def build(folder: Path) -> None:
        if source:
            tokenizer = TextTokenizer.load(Path(source))
        else:
            texts = (text for document in _in_turns(documents, "train") for text in document.texts)
            tokenizer = TextTokenizer.train(texts, config.text_tokenizer)
        tokenizer.save(folder / "tokenizer.json")

    return _timed("text tokenizer", final, build)


def prepare_image_tokenizer(config: Config, documents: dict[str, Path]) -> Path:
    """Folder of the image tokenizer: trained on the training pictures, or the one that the config names."""
    size = config.corpus.image_size
    if config.image_tokenizer.path:
        folder = Path(config.image_tokenizer.path)
        tokenizer = ImageTokenizer.load(folder)
        if tokenizer.image_size != size:
            raise UserError(
                f"image_tokenizer.path={folder} is for pictures of {tokenizer.image_size} pixels; "
                f"set corpus.image_size={tokenizer.image_size}"
            )
        return folder
    key = fingerprint(FORMAT, config.image_tokenizer, _names(documents))
    final = _folder(config, _corpus_name(documents), "image", key)

    def build(folder: Path) -> None:
        train = load_pictures(_in_turns(documents, "train"), size, config.image_tokenizer.max_images)
        held_out = load_pictures(_in_turns(documents, "validation"), size, HELD_OUT_PICTURES)
        for split, pictures in zip(SPLITS, (train, held_out), strict=True):
            if not len(pictures):
                raise UserError(
                    f"no {split} document of {', '.join(documents)} has a picture to train an image tokenizer on; set "
                    "image_tokenizer.path to one that is trained, or add pictures"
                )
        with Bar("training the image tokenizer", config.image_tokenizer.steps) as advance:
            train_image_tokenizer(
                train, held_out, config.image_tokenizer, folder, lambda step, row: advance(step, note=_short(row))
            )

    final = _timed("image tokenizer", final, build)
    m = json.loads((final / "metrics.json").read_text())
    print(
        f"  held-out PSNR {m['psnr']:.1f} dB, SSIM {m['ssim']:.3f}, {m['codebook_used']} of {m['codebook_size']} codes "
        f"used, perplexity {m['codebook_perplexity']:.0f}"
    )
    return final


def prepare_tokens(config: Config, documents: dict[str, Path], text: Path, image: Path) -> dict[str, Path]:
    """Token shards of both splits of each source, with vocabulary.json beside them."""
    text_tokenizer, image_tokenizer = TextTokenizer.load(text / "tokenizer.json"), ImageTokenizer.load(image)
    vocabulary = run_vocabulary(config, text_tokenizer, image_tokenizer)
    fingerprints = (text_tokenizer.fingerprint, image_tokenizer.fingerprint, vocabulary.fingerprint)
    folders = {}
    for name, corpus in config.sources.items():
        if corpus.tokens:
            folders[name] = _ready_tokens(config, name, corpus.tokens, fingerprints)
            continue
        folder = documents[name]
        key = fingerprint(FORMAT, folder.name, *fingerprints, config.data.shard_documents)
        folders[name] = _timed(
            f"token shards of {name}",
            _folder(config, name, "tokens", key),
            partial(tokenize_documents, config, folder, text, image),
            resumable=True,
        )
    return folders


def _ready_tokens(config: Config, name: str, location: str, fingerprints: tuple[str, str, str]) -> Path:
    """A folder that stands for token shards elsewhere, made by these tokenizers (text, image) for this vocabulary."""

    def build(out: Path) -> None:
        for split in SPLITS:
            mirror(out / split, join_location(location, split), (MANIFEST, VOCABULARY), config.store)
            made_by = Manifest.load(out / split).fingerprints
            for kind, mine in zip(("text", "image", "vocabulary"), fingerprints, strict=True):
                if made_by.get(kind) != mine:
                    raise UserError(
                        f"the token shards {location} were made with another {kind} ({made_by.get(kind)}) than this "
                        f"run's ({mine}); set text_tokenizer.path, image_tokenizer.path and objective.num_sentinels "
                        "as they were"
                    )
        store = open_store(location, config.store)
        for file_name in ("flops.json", VOCABULARY):
            with store.open(file_name) as file:
                (out / file_name).write_bytes(file.read())

    return _timed(f"token shards of {name}", _folder(config, name, "tokens", fingerprint(FORMAT, location)), build)


def prepare_encoder(config: Config, documents: dict[str, Path]) -> Path | None:
    """Folder of the dual encoder, trained on the training pairs; None where the run needs none of its own."""
    retrieval = config.retrieval
    if not (retrieval.enabled and documents and retrieval.encoder == "dual" and not retrieval.encoder_path):
        return None
    settings = {key: value for key, value in asdict(retrieval).items() if key in OF_DUAL}
    key = fingerprint(FORMAT, settings, config.seed, _names(documents))
    final = _folder(config, _corpus_name(documents), "encoder", key)

    def build(folder: Path) -> None:
        with Bar("training the dual encoder", retrieval.dual_steps) as advance:
            train_dual(
                _in_turns(documents, "train"),
                _in_turns(documents, "validation"),
                retrieval,
                folder,
                config.seed,
                lambda step, row: advance(step, note=_short(row)),
            )

    _timed("dual encoder", final, build)
    print(f"  {encoder_accuracy(final)}", flush=True)
    return final


def encoder_accuracy(folder: Path) -> str:
    """How often a dual encoder finds the picture of a held-out caption."""
    m = json.loads((folder / METRICS).read_text())
    n, shares = m["held_out"], [f"{100 * m[f'r@{rank}']:.1f} % at {rank}" for rank in RANKS]
    return (
        f"held-out captions find their picture among {n:,}: {', '.join(shares)} "
        f"(by chance {', '.join(f'{100 * rank / n:.1f} %' for rank in RANKS)})"
    )


def prepare_neighbours(config: Config, documents: dict[str, Path], trained: Path | None = None) -> dict[str, Path]:
    """Neighbours of both splits of each source among the training documents of its source; {} without retrieval.

    trained: folder of the encoder that `prepare_encoder` trained.
    """
    if not config.retrieval.enabled or not documents:
        return {}
    block = [Path(folder) for folder in config.retrieval.block]
    blocked = [_block_fingerprint(folder) for folder in block]
    # What is decided at load time does not change the artifact, nor do the names of folders.
    default = RetrievalConfig()
    retrieval = replace(config.retrieval, **{name: getattr(default, name) for name in AT_LOAD_TIME})
    if trained:
        retrieval = replace(retrieval, encoder_path=str(trained))
    encoder = open_encoder(retrieval).fingerprint
    folders = {}
    for name, folder in documents.items():
        key = fingerprint(FORMAT, retrieval, encoder, blocked, config.seed, folder.name)

        def build(out: Path, name: str = name, folder: Path = folder) -> None:
            def run(work: Work, tasks: list[Task], done: Path, label: str) -> list[Task]:
                label, processes = f"{label} of {name}", config.data.processes
                return run_partitions(work, tasks, done, label, processes, runner=config.runner)

            build_neighbours({split: folder / split for split in SPLITS}, retrieval, out, config.seed, run, block)

        final = _folder(config, name, "neighbours", key)
        folders[name] = _timed(f"neighbours of {name}", final, build, resumable=True)
        for split in SPLITS:
            report_neighbours(f"{name}/{split}", json.loads((folders[name] / split / NEIGHBOURS).read_text()))
    return folders


def report_neighbours(where: str, facts: dict[str, Any]) -> None:
    """Say where documents have no neighbour, and why."""
    without, total = facts["without_neighbours"], facts["queries"]["documents"]
    if without:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in facts["left_out"].items()) or "nothing was found"
        print(f"  {without:,} of {total:,} documents of {where} have no neighbour ({reasons})", flush=True)


def prepare_inlined(config: Config, tokens: dict[str, Path], neighbours: dict[str, Path]) -> dict[str, Path]:
    """With retrieval.inlined, the tokens of the candidates of each source, document by document; else only those
    that come with ready token shards (corpus.retrieved)."""
    folders: dict[str, Path] = {}
    if not config.retrieval.enabled:
        return folders
    for name, corpus in config.sources.items():
        if corpus.tokens and corpus.retrieved:
            location = corpus.retrieved

            def copy(out: Path, location: str = location) -> None:
                for split in SPLITS:
                    mirror(out / split, join_location(location, split), (MANIFEST, VOCABULARY), config.store)

            final = _folder(config, name, "inlined", fingerprint(FORMAT, location))
            folders[name] = _timed(f"inlined shards of {name}", final, copy)
        elif corpus.tokens:
            print(f"  {name} came as ready tokens without corpus.retrieved: it trains without retrieved documents")
        elif config.retrieval.inlined and name in neighbours:
            key = fingerprint(FORMAT, tokens[name].name, neighbours[name].name)
            build = partial(join_retrieved, config, tokens[name], neighbours[name])
            final = _folder(config, name, "inlined", key)
            folders[name] = _timed(f"inlined shards of {name}", final, build, resumable=True)
    return folders


def prepare_pictures(
    config: Config, documents: dict[str, Path], tokens: dict[str, Path], image: Path
) -> dict[str, Path]:
    """Latents and captions of both splits of each source, for the diffusion baseline; {} for models of tokens."""
    if not config.model.is_diffusion:
        return {}
    folders = {}
    for name, folder in documents.items():
        final = _folder(config, name, "pictures", fingerprint(FORMAT, folder.name, tokens[name].name))
        build = partial(encode_pictures, config, folder, tokens[name], image)
        folders[name] = _timed(f"latents of {name}", final, build, resumable=True)
    return folders


def _block_fingerprint(folder: Path) -> str:
    """Identity of an evaluation set. Raises UserError where there is none."""
    return DocumentShards(folder).manifest.fingerprint


def load_pictures(documents: Iterable[Document], image_size: int, limit: int) -> np.ndarray:
    """(N, S, S, 3) uint8: the first `limit` pictures of documents, decoded and square."""
    pictures: list[np.ndarray] = []
    for document in documents:
        pictures += [decode_square(image.data, image_size) for image in document.images[: limit - len(pictures)]]
        if len(pictures) == limit:
            break
    return np.stack(pictures) if pictures else np.empty((0, image_size, image_size, 3), np.uint8)


def _in_turns(documents: dict[str, Path], split: str) -> Iterator[Document]:
    """The documents of all sources, one of each in turn."""
    rows = zip_longest(*(DocumentShards(folder / split) for folder in documents.values()))
    return (document for document in chain.from_iterable(rows) if document is not None)


def _names(documents: dict[str, Path]) -> Any:
    """What made the documents: the name of the folder, or of the folder of each source."""
    names = [folder.name for folder in documents.values()]
    return names[0] if len(names) == 1 else names


def _corpus_name(documents: dict[str, Path]) -> str:
    """The folder of what belongs to all sources together."""
    return next(iter(documents)) if len(documents) == 1 else MIX  # also where no source has documents


def _folder(config: Config, name: str, stage: str, key: str) -> Path:
    return Path(config.data_dir) / name / f"{stage}-{key}"


def _path_fingerprint(key: str, path: str) -> str:
    """Identity of the user's data: names, sizes and times of the files in a folder; of a table, the table's own."""
    root = Path(path)
    if not root.exists():
        what = "a folder of pictures or tars, or a captions file" if key == "path" else "a folder of pictures"
        raise UserError(f"corpus.{key}={path} does not exist; give {what}")
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    return fingerprint(str(root.resolve()), [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files])


def _timed(what: str, final: Path, build: Callable[[Path], None], resumable: bool = False) -> Path:
    start, existed = time.monotonic(), final.is_dir()
    build_artifact(final, build, resumable)
    print(
        f"{what}: {os.path.relpath(final)} ({'found' if existed else f'built in {time.monotonic() - start:.1f} s'})",
        flush=True,
    )
    return final


def _short(row: dict[str, Any]) -> str:
    return "  ".join(f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, (int, float)))

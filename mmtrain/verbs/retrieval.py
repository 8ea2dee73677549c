"""`mmtrain retrieval`: neighbours of every document of a corpus, and the join of their tokens."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmtrain.config import Config, UserError
from mmtrain.config.compose import compose
from mmtrain.config.randomness import random_stream
from mmtrain.retrieval import Hit, Neighbours, window_document
from mmtrain.retrieval.build import NEIGHBOURS
from mmtrain.shards import DocumentShards
from mmtrain.track import closing_box
from mmtrain.track.inspect import FoundWindow, Inspected, write_inspect
from mmtrain.verbs import prepare

SHOWN = 5
INSPECTED = 40
PAGE = "retrieval.html"
CHANNELS = ("text", "pictures")


def main(argv: list[str]) -> int:
    """Search neighbours, or find them, and show a few; `join` and `inspect` make something of them."""
    if argv[:1] == ["join"]:
        return _join(argv[1:])
    if argv[:1] == ["inspect"]:
        return _inspect(argv[1:])
    if argv[:1] == ["train-encoder"]:
        return _train_encoder(argv[1:])
    if argv[:1] and "=" not in argv[0] and not argv[0].startswith("-"):
        raise UserError(
            f"mmtrain retrieval has no {argv[0]!r}; it has train-encoder, join and inspect, or settings "
            "alone (KEY=VALUE)"
        )
    documents, folders = _prepared(compose(argv))
    places = {}
    for name, folder in folders.items():
        places[f"neighbours of {name}"] = os.path.relpath(folder)
        places[f"left out of {name}"] = _show(documents[name], folder)
    closing_box("neighbours", places)
    return 0


def _prepared(config: Config) -> tuple[dict[str, Path], dict[str, Path]]:
    """Documents and neighbours of each source. Raises UserError where there are no neighbours."""
    documents = prepare.prepare_documents(config)
    folders = prepare.prepare_neighbours(config, documents, prepare.prepare_encoder(config, documents))
    if not folders:
        raise UserError(
            "there are no neighbours: retrieval.enabled=false (use retrieval=hashed), or all sources came tokenized"
        )
    return documents, folders


def _show(documents: Path, folder: Path) -> str:
    """Print the neighbours of a few documents; returns what was left out."""
    memory, neighbours = DocumentShards(documents / "train"), Neighbours(folder / "validation")
    queries = DocumentShards(documents / "validation")
    for i in range(min(SHOWN, len(queries))):
        windows = [window_document(memory, *neighbours.place(int(j))) for j in neighbours.candidates(i)[:3]]
        found = [" ".join(window.texts) or window.id for window in windows]
        print(f"{' '.join(queries[i].texts) or queries[i].id}\n    " + "\n    ".join(found))
    facts = json.loads((folder / "train" / NEIGHBOURS).read_text())
    return ", ".join(f"{count:,} {reason}" for reason, count in facts["left_out"].items()) or "none"


def _inspect(argv: list[str]) -> int:
    numbers: list[str] = []
    paths: list[str] = []
    settings: list[str] = []
    for word in argv:
        (numbers if word.isdecimal() else paths if word.endswith(".html") else settings).append(word)
    config = compose(settings)
    documents, folders = _prepared(config)
    places = {}
    for name, folder in folders.items():
        path = Path(paths[0]) if paths else folder.parent / PAGE
        path = path.with_stem(f"{path.stem}-{name}") if paths and len(folders) > 1 else path
        memory, queries = DocumentShards(documents[name] / "train"), DocumentShards(documents[name] / "validation")
        found = Neighbours(folder / "validation")
        count = min(int(numbers[0]) if numbers else INSPECTED, len(queries))
        drawn = np.sort(random_stream("inspect", config.seed).choice(len(queries), count, replace=False)).tolist()

        def window(hit: Hit, memory: DocumentShards = memory, found: Neighbours = found) -> FoundWindow:
            return FoundWindow(window_document(memory, *found.place(hit.number)), hit.score, hit.reason)

        rows = [
            Inspected(queries[i], {kind: [window(hit) for hit in found.hits(i, c)] for c, kind in enumerate(CHANNELS)})
            for i in drawn
        ]
        facts = {
            "documents": len(queries),
            "memory": len(memory),
            "without neighbors": found.facts["without_neighbours"],
            "mean score": round(found.facts["mean_score"] or 0.0, 3),
            **{f"left out: {reason.replace('_', ' ')}": n for reason, n in found.facts["left_out"].items()},
        }
        places[f"neighbours of {name}"] = os.path.relpath(write_inspect(path, f"Neighbors of {name}", rows, facts))
    closing_box("inspect", places)
    return 0


def _train_encoder(argv: list[str]) -> int:
    config = compose(argv)
    dual = replace(config.retrieval, enabled=True, encoder="dual", encoder_path="")
    documents = prepare.prepare_documents(config)
    folder = prepare.prepare_encoder(replace(config, retrieval=dual), documents)
    if folder is None:
        raise UserError("there is nothing to train an encoder on: every source came as ready tokens")
    places = {
        "encoder": os.path.relpath(folder),
        "accuracy": prepare.encoder_accuracy(folder),
        "search with it": "retrieval=dual, which finds it again",
        "with another corpus": f"retrieval=dual retrieval.encoder_path={os.path.relpath(folder)}",
    }
    closing_box("encoder", places)
    return 0


def _join(argv: list[str]) -> int:
    config = compose(argv)
    config = replace(config, retrieval=replace(config.retrieval, inlined=True))
    inlined = prepare.prepare(config).inlined
    if not inlined:
        raise UserError("there is nothing to join: retrieval.enabled=false, or every source came as ready tokens")
    places = {f"inlined shards of {name}": os.path.relpath(folder) for name, folder in inlined.items()}
    places["train with them here"] = "retrieval.inlined=true"
    places["or from a store"] = "corpus.tokens=URL corpus.retrieved=URL, after both folders were copied there"
    closing_box("join", places)
    return 0

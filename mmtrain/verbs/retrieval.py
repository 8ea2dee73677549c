"""`mmtrain retrieval`: neighbours of every document of a corpus."""

import json
import os
from pathlib import Path

from mmtrain.config import UserError
from mmtrain.config.compose import compose
from mmtrain.retrieval import Neighbours
from mmtrain.shards import DocumentShards
from mmtrain.track import closing_box
from mmtrain.verbs import prepare

SHOWN = 5


def main(argv: list[str]) -> int:
    """Search neighbours, or find them, and show a few."""
    config = compose(argv)
    documents = prepare.prepare_documents(config)
    folders = prepare.prepare_neighbours(config, documents)
    if not folders:
        raise UserError("retrieval.enabled=false: there is nothing to do; use retrieval=hashed")
    places = {}
    for name, folder in folders.items():
        places[f"neighbours of {name}"] = os.path.relpath(folder)
        places[f"left out of {name}"] = _show(documents[name], folder)
    closing_box("neighbours", places)
    return 0


def _show(documents: Path, folder: Path) -> str:
    """Print the neighbours of a few documents; returns what was left out."""
    memory, neighbours = DocumentShards(documents / "train"), Neighbours(folder / "validation")
    queries = DocumentShards(documents / "validation")
    for i in range(min(SHOWN, len(queries))):
        found = [" ".join(memory[int(j)].texts) or memory[int(j)].id for j in neighbours.candidates(i)[:3]]
        print(f"{' '.join(queries[i].texts) or queries[i].id}\n    " + "\n    ".join(found))
    facts = json.loads((folder / "train" / "neighbours.json").read_text())
    return ", ".join(f"{count} {reason}" for reason, count in facts["left_out"].items()) or "none"

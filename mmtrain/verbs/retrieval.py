"""`mmtrain retrieval`: neighbours of every document of a corpus."""

import json
import os

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
    folder = prepare.prepare_neighbours(config, documents)
    if folder is None:
        raise UserError("retrieval.enabled=false: there is nothing to do; use retrieval=hashed")
    memory, neighbours = DocumentShards(documents / "train"), Neighbours(folder / "validation")
    queries = DocumentShards(documents / "validation")
    for i in range(min(SHOWN, len(queries))):
        found = [" ".join(memory[int(j)].texts) or memory[int(j)].id for j in neighbours.candidates(i)[:3]]
        print(f"{' '.join(queries[i].texts) or queries[i].id}\n    " + "\n    ".join(found))
    facts = json.loads((folder / "train" / "neighbours.json").read_text())
    left_out = ", ".join(f"{count} {reason}" for reason, count in facts["left_out"].items())
    closing_box("neighbours", {"folder": os.path.relpath(folder), "left out": left_out or "none"})
    return 0

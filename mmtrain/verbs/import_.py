"""`mmtrain import`: a Hugging Face folder as a weights folder."""

import os
from pathlib import Path
from typing import Any

from mmtrain.config import UserError, build_artifact
from mmtrain.config.weights import IMPORT
from mmtrain.models.huggingface import import_folder
from mmtrain.track import closing_box
from mmtrain.verbs.export import named, need, read_shard_bytes, refuse_another


def main(argv: list[str]) -> int:
    """Read the folder that the first word names into out=FOLDER."""
    given, rest = named(argv, ("out", "shard_bytes"))
    if len(rest) != 1 or rest[0].startswith("-"):
        raise UserError("`mmtrain import SOURCE out=FOLDER` reads one Hugging Face folder; see `mmtrain import --help`")
    source, out = Path(rest[0]), Path(need(given, "out", "import"))
    if not source.is_dir():
        raise UserError(f"{source} is no folder; give one that transformers saved, or that you downloaded")
    shard_bytes = read_shard_bytes(given)
    refuse_another(out, IMPORT, {"source": str(source)})
    facts: dict[str, Any] = {}
    build_artifact(out, lambda partial: facts.update(import_folder(source, partial, shard_bytes)))
    said = f"{facts['parameters']:,} parameters of {source.name}" if facts else f"{source.name} was there already"
    closing_box(said, {"weights": os.path.relpath(out), "next": f"mmtrain train model.weights={os.path.relpath(out)}"})
    return 0

"""`mmtrain import`: a Hugging Face folder as a weights folder."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from mmtrain.config import UserError, build_artifact
from mmtrain.config.weights import open_weights
from mmtrain.flops.lineage import COMPUTE, compute_of_published, read_compute
from mmtrain.models.huggingface import import_folder
from mmtrain.track import closing_box
from mmtrain.verbs.export import named, need, read_shard_bytes


def main(argv: list[str]) -> int:
    """Read the folder that the first word names into out=FOLDER."""
    given, rest = named(argv, ("out", "shard_bytes", "baseline"))
    if len(rest) != 1 or rest[0].startswith("-"):
        raise UserError("`mmtrain import SOURCE out=FOLDER` reads one Hugging Face folder; see `mmtrain import --help`")
    source, out = Path(rest[0]), Path(need(given, "out", "import"))
    if not source.is_dir():
        raise UserError(f"{source} is no folder; give one that transformers saved, or that you downloaded")
    shard_bytes = read_shard_bytes(given)
    if out.exists() or out.is_symlink():
        raise UserError(f"out={out} exists already; choose another folder, or delete that one")
    compute = compute_of_published(given["baseline"]) if "baseline" in given else read_compute(source)
    build_artifact(out, partial(_fill, source, shard_bytes, compute))
    folder = os.path.relpath(out)
    places = {"weights": folder, "next": f"mmtrain train model.weights={folder}"}
    closing_box(f"{open_weights(out).facts['parameters']:,} parameters of {source.name}", places)
    return 0


def _fill(source: Path, shard_bytes: int, compute: dict[str, Any] | None, out: Path) -> None:
    import_folder(source, out, shard_bytes)
    if compute:
        (out / COMPUTE).write_text(json.dumps(compute, indent=1) + "\n", encoding="utf-8")

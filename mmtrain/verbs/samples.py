"""The folder of samples that `mmtrain generate` leaves: pictures, pages, a grid and the record."""

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageDraw

from mmtrain.config import UserError, sync_folder, sync_tree, write_text_atomic
from mmtrain.documents import encode_png
from mmtrain.generate import Sample

RECORD, GRID = "samples.json", "grid.png"
ZOOM_TO = 192
CAPTION_HEIGHT = 30
GRID_ROWS, GRID_COLUMNS = 32, 16


def check_folder(final: Path, command: str) -> None:
    """Raise UserError where `final` holds files that a command with the fingerprint `command` would not write."""
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    try:
        written_by = json.loads((final / RECORD).read_text())["command"]
    except (OSError, ValueError, KeyError, TypeError):
        written_by = None
    if written_by != command:
        raise UserError(f"{os.path.relpath(final)} holds other files; give another generate.out, or remove it")


@contextmanager
def output_folder(final: Path) -> Iterator[Path]:
    """A hidden folder beside `final` to write into; its files then go to `final`, all or, after an error, none."""
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{os.path.relpath(final)} cannot be written ({error}); give another generate.out") from error
    try:
        yield partial
        sync_tree(partial)
        if not final.exists() or not any(final.iterdir()):
            os.replace(partial, final)
        else:  # the same command before: the same files
            for path in sorted(partial.iterdir(), key=lambda path: path.name == RECORD):
                os.replace(path, final / path.name)
        sync_folder(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_sample(folder: Path, sample: Sample, prompt: str, is_page: bool) -> dict[str, Any]:
    """Write a sample's pictures, or a page of its texts and pictures; returns the names and the text for the record."""
    words = re.sub("[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
    stem = "-".join(filter(None, [f"{sample.prompt:03d}-{sample.number:02d}", words]))
    pictures = [part for part in sample.parts if not isinstance(part, str)]
    names = [f"{stem}-{i}.png" for i in range(len(pictures))] if is_page else [f"{stem}.png"] * len(pictures)
    for name, pixels in zip(names, pictures, strict=True):
        (folder / name).write_bytes(encode_png(pixels))
    if not is_page:
        return {"file": names[0]} if names else {"text": sample.text}
    remaining = iter(names)
    parts = [part if isinstance(part, str) else f"![]({next(remaining)})" for part in sample.parts]
    write_text_atomic(folder / f"{stem}.md", "\n\n".join([prompt, *parts]) + "\n")
    return {"file": f"{stem}.md", "pictures": names, "text": sample.text}


def picture_grid(rows: Sequence[Sequence[np.ndarray]], captions: Sequence[str]) -> PillowImage.Image:
    """Rows of (S, S, 3) uint8 pictures, enlarged, each row under its caption; the first rows and columns of many."""
    rows = [row[:GRID_COLUMNS] for row in rows[:GRID_ROWS]]
    zoom = max(1, ZOOM_TO // rows[0][0].shape[0])
    side = rows[0][0].shape[0] * zoom
    columns = max(len(row) for row in rows)
    grid = PillowImage.new(
        "RGB", (max(columns * (side + 8), 480) + 8, len(rows) * (side + CAPTION_HEIGHT + 8)), "white"
    )
    pen = ImageDraw.Draw(grid)
    for index, (row, words) in enumerate(zip(rows, captions, strict=False)):
        top = index * (side + CAPTION_HEIGHT + 8)
        pen.text((8, top + 8), words[:100], fill="black", font_size=15)
        for column, pixels in enumerate(row):
            enlarged = PillowImage.fromarray(pixels).resize((side, side), PillowImage.Resampling.NEAREST)
            grid.paste(enlarged, (8 + column * (side + 8), top + CAPTION_HEIGHT))
    return grid

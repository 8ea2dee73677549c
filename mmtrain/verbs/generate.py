"""`mmtrain generate`: pictures for captions, captions for pictures."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageDraw

from mmtrain.config import UserError, write_text_atomic
from mmtrain.documents import BadImage, decode_square, image_from_bytes
from mmtrain.flops import forward_flops
from mmtrain.generate import SamplingSettings
from mmtrain.track import closing_box
from mmtrain.verbs.trained import TrainedRun, open_trained, show_progress

ZOOM_TO = 192
CAPTION_HEIGHT = 30


def main(argv: list[str]) -> int:
    """Sample what generate.prompts asks for (default: the first held-out documents) into RUN/samples."""
    run = open_trained(argv)
    g = run.config.generate
    out = Path(g.out) if g.out else run.folder / "samples" / f"{g.task}-step{run.checkpoint.step}-seed{g.seed}"
    out.mkdir(parents=True, exist_ok=True)
    samples = draw(run, out) if g.task == "image" else caption(run)
    record = {
        "checkpoint": f"{run.folder.name}/{run.checkpoint.path.name}",
        "vocabulary": run.vocabulary.fingerprint,
        "task": g.task,
        "seed": g.seed,
        "settings": {"temperature": g.temperature, "top_p": g.top_p, "guidance": g.guidance},
        "samples": samples,
    }
    write_text_atomic(out / "samples.json", json.dumps(record, indent=1, ensure_ascii=False))
    places = {"samples": os.path.relpath(out), "record": os.path.relpath(out / "samples.json")}
    if g.task == "image":
        places["grid"] = os.path.relpath(out / "grid.png")
    closing_box(f"{len(samples)} samples of {record['checkpoint']}", places)
    return 0


def draw(run: TrainedRun, out: Path) -> list[dict[str, Any]]:
    """Pictures for captions, as PNG files and a grid; returns their records."""
    g = run.config.generate
    captions = list(g.prompts) or [document.texts[0] for document in run.held_out(4) if document.texts]
    settings = SamplingSettings(g.temperature, g.top_p, g.guidance)
    retrieved = run.retrieved(captions)
    with show_progress(run.sampler, "drawing"):
        samples = run.sampler.images(captions, settings, g.seed, g.num_samples, retrieved)
    records = []
    for sample in samples:
        words = re.sub("[^a-z0-9]+", "-", captions[sample.prompt].lower())[:40]
        name = f"{sample.prompt:03d}-{sample.number:02d}-{words}.png"
        PillowImage.fromarray(sample.pixels).save(out / name)
        records.append({"prompt": captions[sample.prompt], "number": sample.number, "file": name})
    rows = [[s.pixels for s in samples if s.prompt == index] for index in range(len(captions))]
    picture_grid(rows, captions).save(out / "grid.png")
    guided = 2 if g.guidance != 1 else 1
    longest = run.sampler.image.tokens_per_image + max(len(run.text.encode(c)) for c in captions) + 2
    longest += max(sum(len(ids) + 1 for ids in documents) for documents in retrieved) if retrieved else 0
    lengths = [longest] * (guided * len(samples))
    run.book("sampling", forward_flops(run.config.model, run.vocabulary.size, lengths))
    return records


def caption(run: TrainedRun) -> list[dict[str, Any]]:
    """Captions for pictures, printed; returns their records."""
    g, size = run.config.generate, run.config.corpus.image_size
    if g.prompts:
        names = list(g.prompts)
        pictures = [_read(Path(name), size, run.config.corpus.max_pixels) for name in names]
    else:
        documents = [document for document in run.held_out(4) if document.images]
        names = [document.id for document in documents]
        pictures = [decode_square(document.images[0].data, size) for document in documents]
    retrieved = run.retrieved(pictures)
    settings = SamplingSettings(g.temperature, g.top_p)
    with show_progress(run.sampler, "captioning"):
        samples = run.sampler.captions(
            np.stack(pictures), settings, g.seed, g.num_samples, g.max_text_tokens, retrieved
        )
    for sample in samples:
        print(f"{names[sample.prompt]}: {sample.text}")
    lengths = [run.image.tokens_per_image + g.max_text_tokens] * len(samples)
    run.book("sampling", forward_flops(run.config.model, run.vocabulary.size, lengths))
    return [{"prompt": names[s.prompt], "number": s.number, "text": s.text} for s in samples]


def picture_grid(rows: list[list[np.ndarray]], captions: list[str]) -> PillowImage.Image:
    """Rows of (S, S, 3) uint8 pictures, enlarged, each row under its caption."""
    zoom = max(1, ZOOM_TO // rows[0][0].shape[0])
    side = rows[0][0].shape[0] * zoom
    columns = max(len(row) for row in rows)
    grid = PillowImage.new(
        "RGB", (max(columns * (side + 8), 480) + 8, len(rows) * (side + CAPTION_HEIGHT + 8)), "white"
    )
    pen = ImageDraw.Draw(grid)
    for index, (row, words) in enumerate(zip(rows, captions, strict=True)):
        top = index * (side + CAPTION_HEIGHT + 8)
        pen.text((8, top + 8), words[:100], fill="black", font_size=15)
        for column, pixels in enumerate(row):
            enlarged = PillowImage.fromarray(pixels).resize((side, side), PillowImage.Resampling.NEAREST)
            grid.paste(enlarged, (8 + column * (side + 8), top + CAPTION_HEIGHT))
    return grid


def _read(path: Path, size: int, max_pixels: int) -> np.ndarray:
    try:
        return decode_square(image_from_bytes(path.read_bytes(), max_pixels).data, size)
    except (OSError, BadImage) as error:
        raise UserError(f"picture {path} cannot be read ({error}); give PNG, JPEG or WebP files") from error

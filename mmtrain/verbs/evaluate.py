"""`mmtrain evaluate`: measure a run on held-out data."""

import json
import os
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from mmtrain.config import write_text_atomic
from mmtrain.documents import encode_png
from mmtrain.evaluate import Proportion, evaluate_shapes
from mmtrain.track import closing_box, read_metrics
from mmtrain.verbs.generate import picture_grid
from mmtrain.verbs.trained import TrainedRun, open_trained, show_progress

GRID = 32


def main(argv: list[str]) -> int:
    """Run the task, print a table, keep RUN/evaluation-TASK.json."""
    run = open_trained(argv)
    return evaluate_run_on_shapes(run) if run.config.task.name == "shapes" else show_losses(run)


def evaluate_run_on_shapes(run: TrainedRun) -> int:
    """Pictures and captions of the shapes corpus, graded."""
    task = run.config.task
    documents = run.held_out(max(task.num_prompts, task.num_captions))
    with show_progress(run.sampler, "sampling"):
        result = evaluate_shapes(run.sampler, documents, task, run.config.seed)
    tables = {
        "pictures": result.pictures,
        "pictures with unseen combinations": result.pictures_held_out,
        "ceiling: true pictures through the tokenizer": result.ceiling,
        "captions": result.captions,
    }
    console = Console()
    for title, shares in tables.items():
        if shares:
            console.print(_table(title, shares))
    folder = run.folder / "samples" / f"evaluation-step{run.checkpoint.step}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in (("drawn", result.drawn),):
        for index, (_, pixels) in enumerate(pairs):
            (folder / f"{name}-{index:04d}.png").write_bytes(encode_png(pixels))
    shown = result.drawn[:GRID]
    picture_grid([[pixels] for _, pixels in shown], [document.texts[0] for document, _ in shown]).save(folder / "grid.png")
    plain = {title: {name: asdict(p) | {"share": p.share} for name, p in shares.items()} for title, shares in tables.items()}
    record = {
        "task": asdict(task),
        "checkpoint": run.checkpoint.path.name,
        "results": plain,
        "captions": [{"truth": document.texts[0], "written": text} for document, text in result.written],
    }
    path = run.folder / "evaluation-shapes.json"
    write_text_atomic(path, json.dumps(record, indent=1))
    guided = 2 if task.guidance != 1 else 1
    length = run.image.tokens_per_image + 40
    run.book_sampling("evaluation", guided * len(result.drawn) + len(result.written), length)
    closing_box("evaluated", {"numbers": os.path.relpath(path), "pictures": os.path.relpath(folder)})
    return 0


def show_losses(run: TrainedRun) -> int:
    """The last validation losses of the run, by modality."""
    rows = [row for row in read_metrics(run.folder / "metrics.jsonl") if row.get("val_loss") is not None]
    table = Table("tokens", "validation loss (nats)", title=f"{run.folder.name}, step {rows[-1]['step'] if rows else 0}")
    last = rows[-1] if rows else {}
    for name in ("val_loss", "val_loss_text", "val_loss_image", "val_loss_special"):
        if last.get(name) is not None:
            table.add_row(name.removeprefix("val_loss").strip("_") or "all", f"{last[name]:.4f}")
    Console().print(table)
    path = run.folder / "evaluation-loss.json"
    write_text_atomic(path, json.dumps(last, indent=1))
    closing_box("evaluated", {"numbers": os.path.relpath(path)})
    return 0


def _table(title: str, shares: dict[str, Proportion]) -> Table:
    table = Table("fact", "right", "95 % interval", title=title, title_justify="left")
    for name, p in shares.items():
        table.add_row(name, f"{100 * p.share:.1f} %  ({p.right}/{p.total})", f"{100 * p.low:.1f} – {100 * p.high:.1f} %")
    return table

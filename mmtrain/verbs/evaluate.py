"""`mmtrain evaluate`: measure a run on held-out data."""

import json
import math
import os
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mmtrain.config import write_text_atomic
from mmtrain.documents import encode_png
from mmtrain.evaluate import (
    Curve,
    Distances,
    Proportion,
    draw_curves,
    evaluate_shapes,
    measure_curve,
    measure_documents,
)
from mmtrain.flops import BACKWARD_AND_FORWARD, forward_flops
from mmtrain.generate import SamplingSettings
from mmtrain.retrieval import CHANNELS, IMAGE, TEXT
from mmtrain.stream import Recipe
from mmtrain.tokens import MODALITIES
from mmtrain.track import closing_box
from mmtrain.train.learner import open_learner
from mmtrain.train.worker import open_sources, open_stream
from mmtrain.verbs.progress import Bar
from mmtrain.verbs.samples import picture_grid
from mmtrain.verbs.trained import TrainedRun, open_trained, show_progress

GRID = 32
FLOOR = "true pictures through the tokenizer"


def main(argv: list[str]) -> int:
    """Run the task, print a table, keep RUN/evaluation-TASK.json."""
    run = open_trained(argv)
    tasks = {"shapes": evaluate_run_on_shapes, "curves": evaluate_run_with_guidance, "loss": evaluate_run_on_loss}
    return tasks[run.config.task.name](run)


def evaluate_run_on_shapes(run: TrainedRun) -> int:
    """Pictures and captions of the shapes corpus, graded."""
    task = run.config.task
    documents = run.held_out(max(task.num_prompts, task.num_captions, task.num_infills))
    with show_progress(run.sampler, "sampling"):
        retrieved = [retrieved_by(run, channel, len(documents)) for channel in (TEXT, IMAGE)]
        result = evaluate_shapes(run.sampler, documents, task, run.config.seed, *retrieved)
    tables = {
        "pictures": result.pictures,
        "pictures with seen combinations": result.pictures_seen,
        "pictures with unseen combinations": result.pictures_unseen,
        f"ceiling: {FLOOR}": result.ceiling,
        "captions": result.captions,
        "masked words, filled in": result.infilled,
    }
    console = Console()
    for title, shares in tables.items():
        if shares:
            console.print(_table(title, shares))
    distances = {"drawn pictures": result.distances, FLOOR: result.floor}
    found = {title: distance for title, distance in distances.items() if distance}
    if found:
        console.print(_distances_table(found))
    folder = run.folder / "samples" / f"evaluation-step{run.checkpoint.step}"
    folder.mkdir(parents=True, exist_ok=True)
    for index, (_, pixels) in enumerate(result.drawn):
        (folder / f"drawn-{index:04d}.png").write_bytes(encode_png(pixels))
    shown = result.drawn[:GRID]
    picture_grid([[pixels] for _, pixels in shown], [document.texts[0] for document, _ in shown]).save(
        folder / "grid.png"
    )
    plain = {
        title: {name: asdict(p) | {"share": p.share} for name, p in shares.items()} for title, shares in tables.items()
    }
    record = {
        "task": asdict(task),
        "checkpoint": run.checkpoint.path.name,
        "results": plain,
        "distances": {title: asdict(distance) for title, distance in found.items()},
        "drawn": [
            {"prompt": document.texts[0], "facts": facts}
            for (document, _), facts in zip(result.drawn, result.facts, strict=True)
        ],
        "captions": [{"truth": document.texts[0], "written": text} for document, text in result.written],
        "infilled": [{"masked": word.caption, "truth": word.word, "written": text} for word, text in result.filled],
    }
    path = run.folder / "evaluation-shapes.json"
    write_text_atomic(path, json.dumps(record, indent=1))
    book_evaluation(run)
    closing_box("evaluated", {"numbers": os.path.relpath(path), "pictures": os.path.relpath(folder)})
    return 0


def evaluate_run_with_guidance(run: TrainedRun) -> int:
    """Attribute accuracy of drawn shapes against the guidance weight, and against k of CD-K."""
    task = run.config.task
    documents = run.held_out(task.num_prompts)
    plain = SamplingSettings(temperature=task.temperature, top_p=task.top_p)
    weights = {weight: replace(plain, guidance=weight) for weight in task.guidance_weights}
    contrastive = replace(plain, contrastive_alpha=task.contrastive_alpha)
    ks = {float(k): replace(contrastive, contrastive_k=k) for k in task.contrastive_ks}
    settings = {"guidance weight": weights, f"k of CD-K (alpha {task.contrastive_alpha:g})": ks}
    with show_progress(run.sampler, "sampling"):
        curves = [measure_curve(run.sampler, documents, name, each, run.config.seed) for name, each in settings.items()]
    console = Console()
    for curve in curves:
        console.print(_curve_table(curve))
    path, figure = run.folder / "evaluation-curves.json", run.folder / "curves.svg"
    results = {
        curve.setting: {
            str(value): {fact: asdict(p) | {"share": p.share} for fact, p in facts.items()}
            for value, facts in curve.points.items()
        }
        for curve in curves
    }
    record = {"task": asdict(task), "checkpoint": run.checkpoint.path.name, "results": results}
    write_text_atomic(path, json.dumps(record, indent=1))
    drawn_with = f"temperature {task.temperature:g}, top-p {task.top_p:g}"
    title = f"{len(documents)} held-out captions, {drawn_with}; 95 % intervals"
    figure.write_bytes(draw_curves(curves, title))
    book_evaluation(run)
    closing_box("evaluated", {"numbers": os.path.relpath(path), "curves": os.path.relpath(figure)})
    return 0


def book_evaluation(run: TrainedRun) -> None:
    """Book all that the sampler did."""
    run.book("evaluation", run.sampler.flops, "evaluate")


def evaluate_run_on_loss(run: TrainedRun) -> int:
    """Cross entropy by modality, or squared error, on the validation batches, and of held-out documents one by one."""
    config = run.config
    stream = open_stream(config, run.artifacts, run.vocabulary, "validation")
    model = run.sampler.model
    learner = open_learner(config, run.artifacts, run.vocabulary, next(model.parameters()).device)
    sums = torch.zeros(len(MODALITIES), 2, dtype=torch.float64)
    batches = max(1, config.train.evaluate_batches)
    tokens, flops = 0, 0
    with torch.inference_mode(), Bar("measuring", batches) as advance:
        for step in range(batches):
            batch, counts = stream.prepare(step)
            inputs, work = learner.inputs(batch, counts, "validation")
            sums += model(**inputs).by_modality.cpu()
            tokens += sum(counts.tokens.values())
            flops += learner.flops(work, counts.tokens, counts.rows)[0].model_causal // BACKWARD_AND_FORWARD
            advance(step + 1)
    is_diffusion, title = config.model.is_diffusion, f"{run.folder.name}, {run.checkpoint.path.name}"
    columns = ("squared error", "cells") if is_diffusion else ("nats per token", "bits per token", "targets")
    table = Table("tokens", *columns, title=title)
    record: dict[str, Any] = {"checkpoint": run.checkpoint.path.name, "batches": batches, "tokens": tokens}
    for name, (loss, count) in zip(("all", *MODALITIES), (sums.sum(0).tolist(), *sums.tolist()), strict=True):
        if count:
            bits = [] if is_diffusion else [f"{loss / count / math.log(2):.4f}"]
            table.add_row(name, f"{loss / count:.4f}", *bits, f"{count:,.0f}")
            record[name] = loss / count
    Console().print(table)
    if not is_diffusion:
        record["documents"], spent = measure_queries(run)
        flops += spent
    path = run.folder / "evaluation-loss.json"
    write_text_atomic(path, json.dumps(record, indent=1))
    run.book("evaluation", flops, "evaluate")
    closing_box("evaluated", {"numbers": os.path.relpath(path)})
    return 0


def retrieved_by(run: TrainedRun, channel: int, limit: int) -> list[list[np.ndarray]] | None:
    """Token ids of what the text, or the pictures, of held-out documents found; drawn as in training, none dropped."""
    config = run.config
    if not config.generate.retrieve or run.artifacts.main not in run.artifacts.neighbours:
        return None
    source = open_sources(config, run.artifacts, "validation", [channel])[0]
    retrieval = replace(config.retrieval, dropout=0.0)
    return [
        source.retrieved(i, (config.seed, source.name, 0, i), retrieval) for i in range(min(limit, len(source.tokens)))
    ]


def measure_queries(run: TrainedRun) -> tuple[dict[str, Any], int]:
    """What evaluation-loss.json says of single documents of the main source, and the FLOPs that it took.

    With retrieval three times: behind candidates of both queries, as in training; behind those that the text found,
    which know nothing of the picture to predict; and behind those that the picture found.
    """
    config, main = run.config, run.artifacts.main
    retrieval = config.retrieval if config.retrieval.enabled else None
    recipe = Recipe(config.objective, retrieval, config.stream.sequence_length, config.seed)
    ways = (
        {"both": CHANNELS, "text": (TEXT,), "image": (IMAGE,)}
        if main in run.artifacts.neighbours
        else {"both": CHANNELS}
    )
    table = Table(
        "retrieved by", "tokens of them", *MODALITIES, title="held-out documents alone, nothing masked (nats per token)"
    )
    record: dict[str, Any] = {"source": main}
    lengths: list[int] = []
    for way, channels in ways.items():
        source = open_sources(config, run.artifacts, "validation", channels)[0]
        count = min(config.task.num_documents, len(source.tokens))
        with Bar("measuring documents", count) as advance:
            found = measure_documents(run.sampler.model, source, recipe, count, advance)
        means = [found.mean(modality) for modality in MODALITIES]
        table.add_row(way, f"{found.retrieved.mean():.0f}", *("" if mean is None else f"{mean:.4f}" for mean in means))
        record["ids"] = found.ids
        record[way] = {
            "nats": found.nats.tolist(),
            "targets": found.targets.tolist(),
            "retrieved": found.retrieved.tolist(),
        }
        lengths += found.lengths
    Console().print(table)
    return record, forward_flops(config.model, run.vocabulary.size, lengths)


def _table(title: str, shares: dict[str, Proportion]) -> Table:
    table = Table("fact", "right", "95 % interval", title=title, title_justify="left")
    for name, p in shares.items():
        table.add_row(
            name, f"{100 * p.share:.1f} %  ({p.right}/{p.total})", f"{100 * p.low:.1f} – {100 * p.high:.1f} %"
        )
    return table


def _distances_table(distances: dict[str, Distances]) -> Table:
    extractor = next(iter(distances.values())).extractor
    table = Table("pictures", f"KID ({extractor})", "standard error", f"Frechet distance ({extractor})")
    table.title, table.title_justify = "distance to the true pictures (lower is better)", "left"
    for title, d in distances.items():
        table.add_row(title, f"{d.kid:.4f}", f"{d.kid_error:.4f}", "–" if d.frechet is None else f"{d.frechet:.3f}")
    return table


def _curve_table(curve: Curve) -> Table:
    facts = list(next(iter(curve.points.values())))
    table = Table(curve.setting, *facts, title="pictures that are right (%)", title_justify="left")
    for value, shares in curve.points.items():
        table.add_row(f"{value:g}", *(f"{100 * shares[fact].share:.1f}" for fact in facts))
    return table

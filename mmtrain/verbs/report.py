"""`mmtrain report`: one self-contained page about a run, or about many (`mmtrain report compare`)."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mmtrain.documents import Document, decode_square, encode_png
from mmtrain.flops import OwnRun, comparison_figure, compute_table
from mmtrain.generate import SamplingSettings
from mmtrain.retrieval import Neighbours, window_document
from mmtrain.shards import DocumentShards
from mmtrain.track import closing_box, goodput, read_metrics
from mmtrain.track.report import ReportData, write_report
from mmtrain.verbs import ablation, report_compare, report_scaling
from mmtrain.verbs.data import describe, left_out
from mmtrain.verbs.trained import TrainedRun, open_trained, show_progress

NUM_DOCUMENTS = 8
NUM_SAMPLES = 3
NUM_NEIGHBOURS = 3
SQUARED_ERROR = "mean squared error of normalized latents"


def main(argv: list[str]) -> int:
    """Sample a few held-out documents and write RUN/report.html; `ablation`, `compare`, `scaling` are of many."""
    if argv[:1] == ["ablation"]:
        return ablation.main(argv[1:])
    if argv[:1] == ["compare"]:
        return report_compare.main(argv[1:])
    if argv[:1] == ["scaling"]:
        return report_scaling.main(argv[1:])
    run = open_trained(argv)
    path = write_report(run.folder, collect(run))
    closing_box("report", {"open": os.path.relpath(path)})
    return 0


def collect(run: TrainedRun) -> ReportData:
    """Everything the page shows."""
    documents = run.held_out(4 * NUM_DOCUMENTS) if run.artifacts.main in run.artifacts.documents else []
    held_out = [document for document in documents if document.texts and document.images][:NUM_DOCUMENTS]
    generated, captions = sample(run, held_out)
    run.book("sampling", run.sampler.flops, "report")
    ledger = json.loads((run.folder / "ledger.json").read_text())
    metrics = read_metrics(run.folder / "metrics.jsonl")
    tokenizer = json.loads((run.artifacts.image_tokenizer / "metrics.json").read_text())
    own = [OwnRun(run.config.name, ledger["training_total"])]
    with tempfile.TemporaryDirectory() as folder:
        comparison = comparison_figure(own, Path(folder) / "comparison.png").read_bytes()
    return ReportData(
        title=f"{run.config.name}: {', '.join(run.artifacts.documents)} with {run.config.model.family}",
        summary=summary(run, metrics, ledger),
        corpus=corpus_facts(run),
        metrics=metrics,
        tokenizer={key: value for key, value in tokenizer.items() if isinstance(value, (int, float, str))},
        reconstructions=(run.artifacts.image_tokenizer / "reconstructions.png").read_bytes(),
        neighbours=neighbours(run, held_out),
        generated=generated,
        captions=captions,
        evaluation=evaluation(run),
        loss_unit=SQUARED_ERROR if run.config.model.is_diffusion else "nats per token",
        ledger=ledger,
        goodput=goodput(run.folder),
        comparison=comparison,
        compute=compute_table(own),
        environment=json.loads((run.folder / "environment.json").read_text()),
        commands=commands(run),
    )


def sample(run: TrainedRun, documents: list[Document]) -> tuple[list[Any], list[Any]]:
    """Pictures for held-out captions beside the truth, and captions for held-out pictures beside the truth."""
    if not documents:
        return [], []
    g, size = run.config.generate, run.config.corpus.image_size
    texts = [document.texts[0] for document in documents]
    pictures = np.stack([decode_square(document.images[0].data, size) for document in documents])
    with show_progress(run.sampler, "sampling"):
        settings = SamplingSettings(g.temperature, g.top_p, g.guidance)
        drawn = run.sampler.images(texts, settings, g.seed, NUM_SAMPLES, run.retrieved(texts))
        to_caption = pictures[:0] if run.config.model.is_diffusion else pictures  # it cannot write
        greedy = SamplingSettings(temperature=0.0)
        retrieved = run.retrieved([None] * len(to_caption), list(to_caption))
        written = run.sampler.captions(to_caption, greedy, g.seed, 1, g.max_text_tokens, retrieved)
    truths = [encode_png(picture) for picture in pictures]
    generated = [
        (words, truths[i], [encode_png(s.pixels) for s in drawn if s.prompt == i]) for i, words in enumerate(texts)
    ]
    captions = [(truths[s.prompt], texts[s.prompt], s.text) for s in written]
    return generated, captions


def summary(run: TrainedRun, metrics: list[dict[str, Any]], ledger: dict[str, Any]) -> list[tuple[str, Any]]:
    """The numbers at the top."""
    last: dict[str, Any] = {}
    for row in metrics:
        last.update({key: value for key, value in row.items() if value is not None})
    config = run.config
    return [
        ("parameters", sum(p.numel() for p in run.sampler.model.parameters())),
        ("steps", run.checkpoint.step),
        ("tokens", run.checkpoint.state["tokens"]),
        ("validation loss", last.get("val_loss")),
        ("training flops", ledger["training_total"]),
        ("engine", f"ZeRO-{config.engine.stage}" if config.engine.kind == "deepspeed" else "DDP"),
    ]


def corpus_facts(run: TrainedRun) -> list[tuple[str, Any]]:
    """What was trained on."""
    rows: list[tuple[str, Any]] = [("picture", f"{run.config.corpus.image_size} pixels")]
    for name, documents in run.artifacts.documents.items():
        rows.append(("corpus", name))
        rows += [(split, describe(run.artifacts.tokens[name] / split)) for split in ("train", "validation")]
        rows += [(f"left out: {reason}", count) for reason, count in left_out(documents).items()]
    objective, diffusion = run.config.objective, run.config.diffusion
    said = f"{objective.kind}, whole segments masked with p = {objective.whole_segment_probability}"
    if run.config.model.is_diffusion:
        said = f"{diffusion.objective}, captions left out with p = {diffusion.caption_dropout}"
    rows.append(("objective", said))
    if run.config.retrieval.enabled:
        r = run.config.retrieval
        rows.append(("retrieval", f"up to {r.num_documents} documents ({r.policy}), encoder {r.encoder}"))
    return rows


def neighbours(run: TrainedRun, documents: list[Document]) -> list[tuple[Document, list[tuple[Document, float]]]]:
    """Held-out documents with what was retrieved for them."""
    name = run.artifacts.main
    if name not in run.artifacts.neighbours:
        return []
    memory = DocumentShards(run.artifacts.documents[name] / "train")
    found = Neighbours(run.artifacts.neighbours[name] / "validation")
    positions = {document.id: i for i, document in enumerate(run.held_out(len(found)))}
    rows = []
    for document in documents:
        i = positions[document.id]
        pairs = zip(found.candidates(i)[:NUM_NEIGHBOURS], found.scores(i)[:NUM_NEIGHBOURS], strict=True)
        rows.append((document, [(window_document(memory, *found.place(int(j))), float(score)) for j, score in pairs]))
    return rows


def evaluation(run: TrainedRun) -> dict[str, Any] | None:
    """The numbers of `mmtrain evaluate`, if it was run."""
    path = run.folder / "evaluation-shapes.json"
    if not path.is_file():
        return None
    tables = json.loads(path.read_text())["results"]
    return {
        f"{title}: {name}": f"{100 * p['share']:.1f} % ({100 * p['low']:.1f} – {100 * p['high']:.1f})"
        for title, shares in tables.items()
        for name, p in shares.items()
    }


def commands(run: TrainedRun) -> list[str]:
    """What reproduces this run."""
    folder = os.path.relpath(run.folder)
    trained = json.loads((run.folder / "environment.json").read_text()).get("command")
    return [*([trained] if trained else []), f"mmtrain generate run={folder}", f"mmtrain report run={folder}"]

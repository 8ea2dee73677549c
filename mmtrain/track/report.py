"""report.html: one self-contained file that shows what a run was trained on, what it learned and what it cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.config import write_text_atomic
from mmtrain.documents import Document
from mmtrain.track import page
from mmtrain.track.console import duration
from mmtrain.track.curves import loss_curves
from mmtrain.track.goodput import Goodput
from mmtrain.track.page import key_text, large, pairs_table, picture, plot, scientific, table, text, value_text

if TYPE_CHECKING:
    from mmtrain.flops import ComputeRow  # which imports torch

REPORT_FILE = "report.html"
LEDGER_LABELS = {
    "train_text": "training: text tokens",
    "train_image": "training: image tokens",
    "train_retrieved": "training: retrieved tokens",
    "train_special": "training: special tokens",
    "image_tokenizer_train": "training the image tokenizer",
    "image_tokenizer_encode": "encoding pictures as tokens",
    "retrieval_train": "training the retrieval encoder",
    "retrieval_encode": "encoding documents for retrieval",
    "evaluation": "validation and evaluation",
    "sampling": "sampling",
    "repeated": "steps repeated after a crash",
}


@dataclass
class ReportData:
    """Everything that the report shows; what is empty is left out.

    Pictures are encoded bytes (PNG, JPEG or WEBP). Texts may come from strangers. Numbers under a key with
    "flops" in it are shown as FLOPs.
    """

    title: str
    summary: list[tuple[str, Any]] = field(default_factory=list)  # (label, value) shown large at the top
    corpus: list[tuple[str, Any]] = field(default_factory=list)  # (label, value)
    metrics: list[dict[str, Any]] = field(default_factory=list)  # rows of read_metrics
    tokenizer: dict[str, Any] = field(default_factory=dict)  # PSNR, SSIM, codebook use, ...
    reconstructions: bytes | None = None
    neighbours: list[tuple[Document, list[tuple[Document, float]]]] = field(default_factory=list)  # query, (doc, score)
    generated: list[tuple[str, bytes | None, list[bytes]]] = field(default_factory=list)  # caption, truth, samples
    captions: list[tuple[bytes, str, str]] = field(default_factory=list)  # picture, true and generated caption
    evaluation: dict[str, Any] | None = None
    loss_unit: str = "nats per token"
    ledger: dict[str, Any] = field(default_factory=dict)  # contents of ledger.json
    goodput: Goodput | None = None
    comparison: bytes | None = None  # picture of comparison_figure
    compute: "list[ComputeRow]" = field(default_factory=list)  # rows of compute_table
    environment: dict[str, Any] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)


def write_report(run_dir: Path, sections: ReportData) -> Path:
    """Write RUN/report.html, atomically, and return its path. It refers to nothing outside itself."""
    builders = (
        ("data", "What it was trained on", _data),
        ("curves", "Loss curves", _curves),
        ("tokenizer", "Image tokenizer", _tokenizer),
        ("neighbours", "Retrieved neighbors", _neighbours),
        ("generated", "Text to image", _generated),
        ("captions", "Image to text", _captions),
        ("evaluation", "Evaluation", _evaluation),
        ("compute", "Compute", _compute),
        ("goodput", "Goodput", _goodput),
        ("environment", "Environment", _environment),
        ("commands", "How to reproduce it", _commands),
    )
    built = [(anchor, heading, build(sections)) for anchor, heading, build in builders]
    built = [(anchor, heading, content) for anchor, heading, content in built if content]
    links = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading, _ in built)
    chapters = "\n".join(
        f'<section id="{anchor}"><h2>{heading}</h2>\n{content}</section>' for anchor, heading, content in built
    )
    body = f"<header><h1>{text(sections.title, 120)}</h1>{_summary(sections)}<nav>{links}</nav></header>\n{chapters}"
    path = Path(run_dir) / REPORT_FILE
    write_text_atomic(path, page.page(sections.title, body))
    return path


def _summary(data: ReportData) -> str:
    facts = "".join(
        f'<div class="fact"><span class="label">{key_text(key)}</span><b>{value_text(str(key), value)}</b></div>'
        for key, value in data.summary
    )
    return f'<div class="facts">{facts}</div>' if facts else ""


def _data(data: ReportData) -> str:
    return pairs_table(data.corpus) if data.corpus else ""


def _curves(data: ReportData) -> str:
    figure = loss_curves(data.metrics, data.loss_unit)
    if figure is None:
        return ""
    return plot(figure, "Loss curves") + _last_losses(data.metrics)


def _last_losses(rows: Sequence[Mapping[str, Any]]) -> str:
    """The last measured losses in a small table, training beside validation."""
    last: dict[str, float] = {}
    for row in rows:
        last.update({key: value for key, value in row.items() if value is not None and "loss" in key})
    kinds = [kind for kind in ("", "_text", "_image", "_special") if f"loss{kind}" in last or f"val_loss{kind}" in last]
    cells = [
        [kind.removeprefix("_") or "all", *(_loss(last.get(f"{prefix}loss{kind}")) for prefix in ("", "val_"))]
        for kind in kinds
    ]
    header = ("tokens", "training loss", "validation loss")
    return "<h3>Last values</h3>" + table(header, cells, ("", "number", "number"))


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _tokenizer(data: ReportData) -> str:
    parts = [pairs_table(data.tokenizer.items())] if data.tokenizer else []
    if data.reconstructions is not None:
        parts.append("<h3>Held-out pictures and their reconstructions</h3>")
        parts.append(plot(data.reconstructions, "Pictures and reconstructions", pixelated=True))
    return "".join(parts)


def _neighbours(data: ReportData) -> str:
    cards = []
    for query, found in data.neighbours:
        shown = "".join(_document(document, f"score {score:.3f}") for document, score in found)
        shown = shown or '<p class="soft">No neighbor passed the filters.</p>'
        cards.append(
            f'<div class="card"><div class="row small">{_document(query, "query", truth=True)}{shown}</div></div>'
        )
    intro = "<p>Each row starts with a document and shows the training documents that retrieval found for it.</p>"
    return intro + "".join(cards) if cards else ""


def _document(document: Document, label: str, truth: bool = False) -> str:
    """One document as a figure: its first picture, a label and the start of its text."""
    words = " ".join(segment for segment in document.segments if isinstance(segment, str))
    images = [segment for segment in document.segments if not isinstance(segment, str)]
    shown = picture(images[0].data, words, 128) if images else '<span class="soft">(text only)</span>'
    kind = ' class="truth"' if truth else ""
    return (
        f'<figure{kind}>{shown}<figcaption dir="auto"><b>{text(label)}</b><br>{text(words, 160)}</figcaption></figure>'
    )


def _generated(data: ReportData) -> str:
    cards = []
    for caption, truth, samples in data.generated:
        figures = [
            f"<figure>{picture(sample, f'sample {number}: {caption}')}</figure>"
            for number, sample in enumerate(samples, start=1)
        ]
        if truth is not None:
            shown = picture(truth, f"held-out truth: {caption}")
            figures.insert(0, f'<figure class="truth">{shown}<figcaption><b>truth</b></figcaption></figure>')
        heading = f'<div dir="auto">{text(caption)}</div>'
        cards.append(f'<div class="card">{heading}<div class="row">{"".join(figures)}</div></div>')
    intro = "<p>Pictures that the model drew from held-out captions, beside the picture that the caption came with.</p>"
    return intro + "".join(cards) if cards else ""


def _captions(data: ReportData) -> str:
    cards = [
        f'<div class="card">{picture(image, truth)}'
        f'<p dir="auto"><span class="label">truth</span><br>{text(truth)}</p>'
        f'<p dir="auto"><span class="label">model</span><br>{text(generated)}</p></div>'
        for image, truth, generated in data.captions
    ]
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _evaluation(data: ReportData) -> str:
    return pairs_table(data.evaluation.items()) if data.evaluation else ""


def _compute(data: ReportData) -> str:
    parts = []
    books = {kind: flops for kind, flops in data.ledger.get("flops", {}).items() if flops}
    if books:
        spent = sum(books.values())
        rows = [
            [
                key_text(LEDGER_LABELS.get(kind, kind)),
                scientific(flops),
                f"{flops / spent:.1%}",
                f'<div class="bar" style="width:{100 * flops / spent:.2f}%"></div>',
            ]
            for kind, flops in sorted(books.items(), key=lambda book: -book[1])
        ]
        totals = {"all work": spent, "training of the model": data.ledger.get("training_total", 0)}
        rows += [[f"<b>{label}</b>", f"<b>{scientific(total)}</b>", "", ""] for label, total in totals.items()]
        parts.append("<h3>Ledger of this run</h3>")
        parts.append(table(("work", "FLOPs", "share", ""), rows, ("", "number", "number", "share")))
        conventions = ". ".join(f"{key}: {value}" for key, value in data.ledger.get("conventions", {}).items())
        parts.append(f'<p class="soft">{text(conventions, 2000)}</p>')
    if data.comparison is not None:
        parts.append("<h3>Beside published models</h3>" + plot(data.comparison, "Training compute of published models"))
    if data.compute:
        header = ("model", "kind", "training FLOPs", "times this run", "FID", "notes")
        marked = [index for index, row in enumerate(data.compute) if row.own]
        rows = [_compute_cells(row) for row in data.compute]
        parts.append("<h3>Training compute by model</h3>")
        parts.append(table(header, rows, ("", "", "number", "number", "number", ""), marked))
    return "".join(parts)


def _compute_cells(row: "ComputeRow") -> list[str]:
    ratio = "–" if row.ratio is None else f"{large(float(f'{row.ratio:.3g}'))} ×"
    fid = "" if row.fid is None else f"{row.fid:g}"
    family = text(row.family.replace("_", " "))
    notes = "; ".join(note for note in (row.reservation, row.fid_note) if note)
    return [text(row.name), family, scientific(row.flops), ratio, fid, f'<span class="soft">{text(notes, 240)}</span>']


def _goodput(data: ReportData) -> str:
    account = data.goodput
    if account is None or account.ratio is None:
        return ""
    facts = {
        "effective training time": f"{account.ratio:.1%}",
        "time in steps that count": duration(account.productive_seconds),
        "time since the first start": duration(account.wall_seconds),
        "interruptions": len(account.interruptions),
        "steps done twice": account.lost_steps,
    }
    parts = [pairs_table(facts.items())]
    if total := sum(account.sections.values()):
        rows = [
            [key_text(name), duration(seconds), f"{seconds / total:.1%}"]
            for name, seconds in sorted(account.sections.items(), key=lambda item: -item[1])
        ]
        parts.append("<h3>Where the time of the steps went</h3>")
        parts.append(table(("section", "time", "share"), rows, ("", "number", "number")))
    if account.interruptions:
        rows = [
            [text(i.cause, 120), str(i.step), str(i.lost_steps), duration(i.down_seconds)]
            for i in account.interruptions
        ]
        header = ("interruption", "at step", "steps done twice", "down for")
        parts.append("<h3>Interruptions</h3>" + table(header, rows, ("", "number", "number", "number")))
    return "".join(parts)


def _environment(data: ReportData) -> str:
    return pairs_table(data.environment.items()) if data.environment else ""


def _commands(data: ReportData) -> str:
    lines = "\n".join(text(command, 4000) for command in data.commands)
    return f"<pre>{lines}</pre>" if lines else ""

"""`mmtrain report compare`: token models against diffusion models, from the ledgers and evaluations of their runs."""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mmtrain.config import UserError, write_text_atomic
from mmtrain.evaluate.compared import find_runs, read_run
from mmtrain.evaluate.comparison import Comparison, Measure, compare_runs, flops_text
from mmtrain.evaluate.comparison_figure import quality_figure
from mmtrain.evaluate.scaling import Estimate
from mmtrain.flops import BOOKS, OwnRun, comparison_figure, hours_figure
from mmtrain.track import closing_box
from mmtrain.track.page import page, plot, scientific, table, text
from mmtrain.verbs.progress import Bar

FOLDER = "comparison"
PAGE, NUMBERS = "comparison.html", "comparison.json"
QUALITY, PUBLISHED, HOURS = "quality.png", "published.png", "hours.png"


def main(words: list[str]) -> int:
    """Write comparison.html, comparison.json and three pictures for the runs, or the sweep, that `words` name."""
    outs = [word.partition("=")[2] for word in words if word.startswith("out=")]
    named = [word for word in words if not word.startswith("out=")]
    if not named or any("=" in Path(word).parts[0] for word in named if not Path(word).exists()):
        raise UserError("give the runs to compare: `mmtrain report compare RUN...`, or the folder of a sweep")
    folders = find_runs(named)
    out = Path(outs[-1]) if outs else (Path(named[0]) if len(named) == 1 else folders[0].parent) / FOLDER
    runs, left_out = [], {}
    with Bar("reading runs", len(folders)) as advance:
        for number, folder in enumerate(folders, 1):
            run = read_run(folder)
            if isinstance(run, str):
                left_out[os.path.relpath(folder)] = run
            else:
                runs.append(run)
            advance(number)
    comparison = compare_runs(runs, left_out)
    write(comparison, out, shlex.join(["mmtrain", "report", "compare", *words]))
    for sentence in comparison.sentences:
        print(sentence)
    for name, reason in list(left_out.items())[:5]:
        print(f"left out: {name} {reason}")
    if len(left_out) > 5:
        print(f"left out: {len(left_out) - 5} more, see {NUMBERS}")
    at = os.path.relpath(out)
    places = {
        "compared": f"{len(runs)} of {len(folders)} runs",
        "open": f"{at}/{PAGE}",
        "numbers": f"{at}/{NUMBERS}",
        "figures": ", ".join((QUALITY, PUBLISHED, HOURS)) + f" in {at}",
    }
    closing_box("comparison", places)
    return 0


def write(comparison: Comparison, out: Path, command: str) -> None:
    """Fill the folder `out`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error}); give another out=FOLDER") from error
    (out / QUALITY).write_bytes(quality_figure(comparison))
    budgets = [int(flops) for flops in comparison.measures[0].scaling.budgets]
    ends = {"largest of our runs": budgets[-1]}
    if len(budgets) > 1:
        ends = {"smallest of our runs": budgets[0], **ends}
    comparison_figure([OwnRun(name, flops) for name, flops in ends.items()], out / PUBLISHED)
    hours_figure(out / HOURS, budgets)
    pictures = {name: (out / name).read_bytes() for name in (QUALITY, PUBLISHED, HOURS)}
    write_text_atomic(out / PAGE, page("Token models and diffusion models", _body(comparison, pictures, command)))
    write_text_atomic(out / NUMBERS, json.dumps({"command": command, **comparison.to_dict()}, indent=1))


def _body(comparison: Comparison, pictures: dict[str, bytes], command: str) -> str:
    said = "".join(f"<li>{text(sentence)}</li>" for sentence in comparison.sentences)
    parts = [f"<header><h1>Token models and diffusion models</h1></header><h2>What the runs say</h2><ul>{said}</ul>"]
    parts.append(plot(pictures[QUALITY], "Quality against training compute"))
    for measure in comparison.measures:
        parts.append(f"<h2>{text(measure.name)}</h2>{_differences(measure)}{_cells(measure)}{_fits(measure)}")
    parts.append(f"<h2>Validation loss, within a family only</h2>{_losses(comparison)}")
    parts.append(f"<h2>Work beside training</h2>{_ledger(comparison)}")
    parts.append("<h2>Beside published models</h2>")
    parts.append(plot(pictures[PUBLISHED], "FID of published models against training FLOPs"))
    parts.append("<p>Published FIDs and ours are not on one scale: ours is measured on other features.</p>")
    parts.append(plot(pictures[HOURS], "A100-hours at 40 % MFU, and published hours"))
    if comparison.left_out:
        rows = [[text(name), text(reason)] for name, reason in comparison.left_out.items()]
        parts.append("<h2>Left out</h2>" + table(("run", "because it"), rows))
    parts.append(f"<h2>How</h2>{_method(comparison)}<pre>{text(command)}</pre>")
    return "\n".join(parts)


def _estimate(estimate: Estimate, show: Callable[[float], str]) -> str:
    return f'{show(estimate.value)} <span class="soft">({show(estimate.low)} to {show(estimate.high)})</span>'


def _differences(measure: Measure) -> str:
    found = measure.scaling
    rows = []
    for budget, flops in enumerate(found.budgets):
        row = [flops_text(flops)]
        for family in found.families:
            envelope = found.envelopes[family].get(budget)
            size = found.best[family].get(budget, "")
            row.append(f"{_estimate(envelope, measure.text)}, {text(size)}" if envelope else "–")
        difference = found.differences.get(budget)
        row.append(_estimate(difference, measure.difference_text) if difference else "–")
        rows.append(row)
    best = [f"{text(family)}, best size" for family in found.families]
    minus = " minus ".join(text(family) for family in found.families[:2]) if len(found.families) > 1 else "difference"
    return table(("FLOPs", *best, minus), rows, ("number", *["number"] * len(best), "number"))


def _cells(measure: Measure) -> str:
    rows = [
        [text(c.family), text(c.setting), flops_text(c.flops), str(c.seeds), _estimate(c.quality, measure.text)]
        for c in measure.scaling.cells
    ]
    header = ("family", "size", "FLOPs", "seeds", "quality (95 % interval)")
    return "<h3>Every size</h3>" + table(header, rows, ("", "", "number", "number", "number"))


def _fits(measure: Measure) -> str:
    scale = "logit(share)" if measure.higher_is_better else measure.name
    if not measure.scaling.fits:
        return "<p>One budget only: nothing is fitted.</p>"
    rows = [
        [text(family), *(f"{e.value:.3f} ({e.low:.3f} to {e.high:.3f})" for e in (fit.intercept, fit.slope))]
        for family, fit in measure.scaling.fits.items()
    ]
    header = (f"fit of the best sizes: {text(scale)} = a + b log10 FLOPs", "a", "b")
    return table(header, rows, ("", "number", "number"))


def _losses(comparison: Comparison) -> str:
    """Mean over seeds of the last validation loss, all targets."""
    rows = []
    for (family, setting, budget), runs in comparison.grouped(by_setting=True).items():
        losses = [run.val_loss["val_loss"] for run in runs if "val_loss" in run.val_loss]
        if losses:
            flops = flops_text(comparison.measures[0].scaling.budgets[budget])
            spread = f"{min(losses):.4f} to {max(losses):.4f}"
            rows.append([text(family), text(setting), flops, f"{np.mean(losses):.4f}", spread])
    header = ("family", "size", "FLOPs", "mean over seeds", "smallest and largest")
    note = "<p>Cross entropy of tokens and the loss of a diffusion objective are different quantities.</p>"
    return note + table(header, rows, ("", "", "number", "number", "number")) if rows else "<p>None was measured.</p>"


def _ledger(comparison: Comparison) -> str:
    """Mean FLOPs of a run by budget and family, in the books beside training."""
    beside = [book for book in BOOKS if not book.startswith("train_")]
    used = [book for book in beside if any(run.ledger[book] for run in comparison.runs)]
    rows = []
    for (family, _, _), runs in comparison.grouped(by_setting=False).items():
        books = [np.mean([run.ledger[book] for run in runs]) for book in used]
        training = np.mean([run.ledger.training_total for run in runs])
        spent = np.mean([run.ledger.spent_total for run in runs])
        numbers = [scientific(float(flops)) for flops in (training, *books, spent)]
        rows.append([text(family), *numbers, f"{spent / training:.2f} ×"])
    names = [text(book.replace("_", " ")) for book in used]
    header = ("family", "training", *names, "all together", "with / without")
    note = (
        "<p>FLOPs, mean of the runs. The comparison above counts training alone. The image tokenizer and the encoding "
        "of the corpus are booked in full in every run that uses them, though they were made once; evaluation and "
        "sampling are what drawing costs.</p>"
    )
    return note + table(header, rows, ("", *["number"] * (len(header) - 1)))


def _method(comparison: Comparison) -> str:
    run = comparison.runs[0]
    drawn = {
        run.family: ", ".join(f"{key} {run.sampling[key]}" for key in ("temperature", "top_p", "guidance"))
        for run in comparison.runs
    }
    sentences = [
        "Accuracy: share of the facts of a caption (background, colors, count, relations, shapes) that the drawn "
        f"picture shows, read from its pixels; mean over {len(run.prompts)} held-out captions, one picture each.",
        f"KID: unbiased squared MMD, cubic kernel, over {run.extractor or 'no features'}; a stand-in that compares "
        "with no published KID or FID.",
        "At each budget a family is represented by its best size. Intervals: 95 % of bootstrap replicates that draw "
        "the captions (blocks of pictures for KID) anew and add deviations between seeds, the best size chosen anew "
        "in each.",
        "Intervals are of one budget each, not corrected for looking at several.",
        f"Drawn with: {'; '.join(f'{family}: {how}' for family, how in drawn.items())}.",
    ]
    return "".join(f"<p>{text(sentence)}</p>" for sentence in sentences)

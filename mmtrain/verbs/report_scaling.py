"""`mmtrain report scaling`: the loss of a ladder's runs as a law of parameters and tokens."""

import json
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmtrain.config import UserError, write_text_atomic
from mmtrain.config.compose import load_frozen
from mmtrain.evaluate.compared import find_runs
from mmtrain.evaluate.loss_law import Law, LawFit, Point, budgets, fit_law, held_out
from mmtrain.evaluate.loss_law_figure import scaling_figure
from mmtrain.flops import Ledger, matmul_parameters
from mmtrain.tokens import Vocabulary
from mmtrain.track import closing_box, read_metrics
from mmtrain.train.checkpoint import newest
from mmtrain.train.run import Artifacts

NUMBERS, FIGURE = "scaling.json", "scaling.png"
LOSSES = ("val_loss", "val_loss_text", "val_loss_image")
CONVENTIONS = {
    "N": "parameters of matrix products, as in the 6ND rule: output head included, embedding look-up not",
    "D": "tokens trained on, of all modalities; padding excluded, repeated epochs included",
    "C": "training_total of the run's ledger: model FLOPs, causal",
    "interval": "95 % of bootstrap replicates that draw the runs anew",
}


def main(words: list[str]) -> int:
    """Fit the runs of SWEEP_FOLDER, or of several folders; writes scaling.json and scaling.png beside them."""
    given = {word.partition("=")[0]: word.partition("=")[2] for word in words if word.startswith(("out=", "flops="))}
    named = [word for word in words if not word.startswith(("out=", "flops="))]
    if not named or any("=" in Path(word).parts[0] for word in named if not Path(word).exists()):
        raise UserError("give the folder of a ladder: `mmtrain report scaling runs/ladder [flops=1e20] [out=FOLDER]`")
    budget = _number(given.get("flops"))
    try:
        import scipy  # noqa: F401, PLC0415
    except ModuleNotFoundError as error:
        raise UserError("a fit needs scipy; install it with pip install 'mmtrain[search]'") from error
    points = []
    for folder in find_runs(named):
        point = read_point(folder)
        if isinstance(point, str):
            print(f"left out: {os.path.relpath(folder)} {point}")
        else:
            points.append(point)
    out = Path(given.get("out") or named[0])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error}); give another out=FOLDER") from error
    record = measure(points, budget)
    (out / FIGURE).write_bytes(record.pop("figure"))
    command = shlex.join(["mmtrain", "report", "scaling", *words])
    write_text_atomic(out / NUMBERS, json.dumps({"command": command, "conventions": CONVENTIONS, **record}, indent=1))
    closing_box(
        "scaling",
        {"runs": len(points), "numbers": os.path.relpath(out / NUMBERS), "figure": os.path.relpath(out / FIGURE)},
    )
    return 0


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else None
    except ValueError:
        value = 0.0
    if value is not None and not 0 < value < float("inf"):
        raise UserError(f"flops={text} is no budget in FLOPs; give a number above 0, such as flops=1e20")
    return value


def read_point(folder: Path) -> Point | str:
    """The run in `folder`, or the reason why it does not count, as the end of a sentence about it."""
    config = load_frozen(folder / "config.yaml")
    if config.model.is_diffusion:
        return "is no model of tokens"
    checkpoint = newest(folder / "checkpoints")
    if checkpoint is None or checkpoint.step < config.train.steps:
        return f"is at step {checkpoint.step if checkpoint else 0} of {config.train.steps}"
    artifacts = Artifacts.load(folder)
    vocabulary = Vocabulary.load(artifacts.tokens[artifacts.main] / "vocabulary.json")
    last: dict[str, Any] = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        last |= {key: value for key, value in row.items() if value is not None}
    losses = {name: float(last[name]) for name in LOSSES if name in last}
    if "val_loss" not in losses:
        return "has no validation loss"
    ledger = Ledger.read(folder / "ledger.json")
    size = matmul_parameters(config.model, vocabulary.size)
    return Point(folder.name, size, int(last["tokens"]), ledger.training_total, losses)


def measure(points: list[Point], budget: float | None) -> dict[str, Any]:
    """Fit every loss, print what comes out of it, and return it with the figure of the first."""
    console, record = Console(), dict[str, Any]()
    table = Table("loss", "E", "A", "B", "alpha", "beta", title="L(N, D) = E + A / N^alpha + B / D^beta")
    said: list[str] = []
    for name in LOSSES:
        if not all(name in point.losses for point in points):
            continue
        fit, predicted = fit_law(points, name), held_out(points, name)
        estimates = {key: fit.estimate(lambda law, key=key: getattr(law, key)) for key in ("E", "A", "B")}
        estimates |= {key: fit.estimate(lambda law, key=key: getattr(law, key)) for key in ("alpha", "beta")}
        table.add_row(name, *(f"{e.value:.4g} ({e.low:.3g} to {e.high:.3g})" for e in estimates.values()))
        record[name] = {
            "law": {key: asdict(estimate) for key, estimate in estimates.items()},
            "flops_per_parameter_and_token": fit.law.per_token,
            "residuals": {p.name: p.losses[name] / float(fit.law.loss(p.parameters, p.tokens)) - 1 for p in points},
        }
        said += _predictions(name, predicted, record[name])
        if name == LOSSES[0]:
            record["figure"] = scaling_figure(points, name, fit, predicted)
        if budget:
            record[name]["optimal"], sentence = _optimum(fit, points, budget)
            said.append(f"{name}: {sentence}")
    console.print(table)
    print("\n".join(said))
    return {"runs": [asdict(point) for point in points], **record}


def _predictions(name: str, predicted: list[tuple[Point, float]] | None, record: dict[str, Any]) -> list[str]:
    """What the runs of the smaller budgets say of those of the largest, which they have not seen."""
    if predicted is None:
        return [f"{name}: too few runs to hold the largest budget out"]
    errors = {point.name: value / point.losses[name] - 1 for point, value in predicted}
    best, largest = min(predicted, key=lambda pair: pair[0].losses[name])[0], predicted[-1][0]
    record["held_out"] = {
        "budget": largest.flops,
        "largest": largest.name,
        "best": best.name,
        "predicted": {point.name: value for point, value in predicted},
        "errors": errors,
    }
    value = predicted[-1][1]
    return [
        f"{name}: the largest run, {largest.name}, held out with all of its budget: predicted {value:.4f}, measured "
        f"{largest.losses[name]:.4f} ({100 * errors[largest.name]:+.2f} %); the best one, {best.name}, "
        f"{100 * errors[best.name]:+.2f} %; the worst error is {100 * max(map(abs, errors.values())):.2f} %"
    ]


def _optimum(fit: LawFit, points: list[Point], flops: float) -> tuple[dict[str, Any], str]:
    """The compute-optimal size for a budget, with its interval, and the size of the ladder that is nearest to it."""

    def parameters(law: Law) -> float:
        return float(law.optimal(flops)[0])

    size, tokens = fit.estimate(parameters), fit.estimate(lambda law: float(law.optimal(flops)[1]))
    loss = fit.estimate(lambda law: float(law.loss(*law.optimal(flops))))
    nearest = min(points, key=lambda p: max(p.parameters / size.value, size.value / p.parameters))
    beyond = flops / budgets(points)[-1][0].flops
    far = f"; the budget is {beyond:.3g} times the largest of the ladder" if beyond > 1.5 else ""
    found = {"flops": flops, "N": asdict(size), "D": asdict(tokens), "loss": asdict(loss), "nearest": nearest.name}
    return found, (
        f"compute-optimal for {flops:.3g} FLOPs: N = {size.value:.3g} ({size.low:.3g} to {size.high:.3g}), "
        f"D = {tokens.value:.3g}, loss {loss.value:.4f} ({loss.low:.4f} to {loss.high:.4f}); nearest of the ladder: "
        f"{nearest.name} (N = {nearest.parameters:,}){far}"
    )

"""`mmtrain report ablation`: the arms of a sweep against each other, with confidence intervals."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mmtrain.config import UserError, write_text_atomic
from mmtrain.config.compose import load_frozen
from mmtrain.evaluate import Estimate, Measured, compare_arms, draw_differences
from mmtrain.flops import Ledger
from mmtrain.tokens import MODALITIES
from mmtrain.track import closing_box
from mmtrain.verbs.sweep import SWEEP

RECORD, FIGURE = "ablation.json", "ablation.png"
# What is compared: column of the losses, and whose candidates stand before the document. Those that its own text or
# picture found may give away what is to be predicted, so each modality is measured behind what the other found, too.
LOSSES = {
    "image loss, retrieved by text": ("image", "text"),
    "image loss, retrieved by both": ("image", "both"),
    "text loss, retrieved by picture": ("text", "image"),
    "text loss, retrieved by both": ("text", "both"),
}

Runs = dict[int, Path]
"""Run directories by seed."""


def main(argv: list[str]) -> int:
    """Compare the arms of sweep=FOLDER with baseline=ARM; writes FOLDER/ablation.json and ablation.png."""
    words = dict(word.partition("=")[::2] for word in argv)
    if set(words) - {"sweep", "baseline"} or "sweep" not in words:
        raise UserError("mmtrain report ablation takes sweep=FOLDER and, perhaps, baseline=ARM")
    folder = Path(words["sweep"])
    console, record, panels = Console(), {}, {}
    for corpus, arms in find_runs(folder).items():
        baseline = words.get("baseline") or next(iter(arms))
        if baseline not in arms:
            raise UserError(f"there is no arm {baseline!r} in {folder}; there is {', '.join(arms)}")
        quantities = measured(arms)
        found = {name: compare_arms(of_arms, baseline) for name, of_arms in quantities.items()}
        console.print(_table(corpus, baseline, found))
        seeds = sorted(next(iter(arms.values())))
        record[corpus] = {
            "baseline": baseline,
            "seeds": seeds,
            "documents": next(iter(quantities.values()))[baseline].sums.shape[1],
            "flops": {arm: spent(runs) for arm, runs in arms.items()},
            "results": {
                name: {arm: {"mean": asdict(mean), "difference": difference and asdict(difference)}
                       for arm, (mean, difference) in of_arms.items()}
                for name, of_arms in found.items()
            },
        }  # fmt: skip
        for kind, is_loss in (("loss (nats per token)", True), ("pictures that are right (share)", False)):
            panel = {
                name: {arm: difference for arm, (_, difference) in of_arms.items() if difference is not None}
                for name, of_arms in found.items()
                if (name in LOSSES) == is_loss
            }
            if panel:
                panels[f"{corpus}: {kind}"] = panel
    write_text_atomic(folder / RECORD, json.dumps(record, indent=1) + "\n")
    (folder / FIGURE).write_bytes(draw_differences(panels, baseline))
    closing_box("ablation", {"numbers": os.path.relpath(folder / RECORD), "figure": os.path.relpath(folder / FIGURE)})
    return 0


def find_runs(folder: Path) -> dict[str, dict[str, Runs]]:
    """Corpus -> arm -> run directory by seed. An arm is the name of a job without its corpus and seed.

    Arms that were not measured with every seed are left out, and named. Raises UserError where the folder is no sweep,
    and where no corpus has two arms left.
    """
    try:
        jobs = json.loads((folder / SWEEP).read_text())["jobs"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is no sweep ({error}); give sweep=FOLDER of `mmtrain train -m`") from error
    found: dict[str, dict[str, Runs]] = {}
    for job in jobs:
        run = folder / job["name"]
        own = dict(word.partition("=")[::2] for word in job["overrides"])
        corpus, seed = own.get("corpus", ""), int(own.get("seed", 0))
        if (run / "config.yaml").is_file():  # else it has not started
            config = load_frozen(run / "config.yaml")
            corpus, seed = config.corpus.name, config.seed
        parts = [part for part in job["name"].split(",") if part.partition("=")[0] not in ("corpus", "seed")]
        found.setdefault(corpus, {}).setdefault(",".join(parts) or "run", {})[seed] = run
    for corpus, arms in found.items():
        for arm, runs in list(arms.items()):
            missing = [seed for seed, run in sorted(runs.items()) if not (run / "evaluation-loss.json").is_file()]
            if missing:
                print(
                    f"mmtrain: {arm} on {corpus} is left out: seed {', '.join(map(str, missing))} was not measured; "
                    "let the sweep finish, with loss in sweep.evaluate"
                )
                del arms[arm]
    found = {corpus: arms for corpus, arms in found.items() if len(arms) > 1}
    if not found:
        raise UserError(f"{folder} has no two arms that were measured with every seed; let the sweep finish first")
    return found


def measured(arms: dict[str, Runs]) -> dict[str, dict[str, Measured]]:
    """Quantity -> arm -> what was measured, over the seeds in order."""
    found: dict[str, dict[str, Measured]] = {}
    for arm, runs in arms.items():
        records = [json.loads((runs[seed] / "evaluation-loss.json").read_text())["documents"] for seed in sorted(runs)]
        if any(record["ids"] != records[0]["ids"] for record in records):
            raise UserError(f"the runs of {arm} were measured on different documents; measure them again")
        for name, (modality, way) in LOSSES.items():
            column = MODALITIES.index(modality)
            # Without retrieval there is one way.
            parts = [record.get(way, record["both"]) for record in records]
            sums, counts = (np.array([part[key] for part in parts], float)[..., column] for key in ("nats", "targets"))
            if counts.any():
                found.setdefault(name, {})[arm] = Measured(sums, counts)
        graded = [runs[seed] / "evaluation-shapes.json" for seed in sorted(runs)]
        if all(path.is_file() for path in graded):
            drawn = [json.loads(path.read_text())["drawn"] for path in graded]
            for name, part in _graded([[picture["facts"] for picture in of_seed] for of_seed in drawn]).items():
                found.setdefault(name, {})[arm] = part
    return {name: of_arms for name, of_arms in found.items() if len(of_arms) == len(arms)}


def _graded(seeds: list[list[dict[str, bool]]]) -> dict[str, Measured]:
    """Fact -> right answers and questions of each picture by seed, and all facts together."""
    names = list(dict.fromkeys(name for picture in seeds[0] for name in picture))
    rows = {
        name: (
            np.array([[float(picture.get(name, False)) for picture in pictures] for pictures in seeds]),
            np.array([[float(name in picture) for picture in pictures] for pictures in seeds]),
        )
        for name in names
    }
    sums, counts = (np.sum([row[i] for row in rows.values()], axis=0) for i in (0, 1))
    return {"all facts": Measured(sums, counts)} | {name: Measured(*row) for name, row in rows.items()}


def spent(runs: Runs) -> dict[str, float]:
    """Mean FLOPs over the seeds: of training, and of the encoder of retrieval beside it."""
    ledgers = [Ledger.read(run / "ledger.json") for run in runs.values()]
    books = {"training": [ledger.training_total for ledger in ledgers]}
    books |= {book: [ledger[book] for ledger in ledgers] for book in ("train_retrieved", "retrieval_encode")}
    return {name: float(np.mean(values)) for name, values in books.items()}


def _table(corpus: str, baseline: str, found: dict[str, dict[str, tuple[Estimate, Estimate | None]]]) -> Table:
    arms = list(next(iter(found.values())))
    others = [f"{arm} - {baseline}" for arm in arms if arm != baseline]
    table = Table(corpus, *arms, *others, title="means over seeds and documents, 95 % intervals", title_justify="left")
    for name, of_arms in found.items():
        differences = [_short(difference, "+") for _, difference in of_arms.values() if difference is not None]
        table.add_row(name, *(_short(mean, "") for mean, _ in of_arms.values()), *differences)
    return table


def _short(estimate: Estimate, sign: str) -> str:
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"

"""What a comparison reads of a run: its ledger, its evaluation on `shapes`, its validation loss."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmtrain.config import Config, UserError
from mmtrain.config.compose import load_frozen
from mmtrain.evaluate.distances import NUM_BLOCKS
from mmtrain.flops import Ledger
from mmtrain.track import read_metrics
from mmtrain.train.checkpoint import newest

EVALUATION = "evaluation-shapes.json"
TOKENS, DIFFUSION = "token models", "diffusion models"
DIFFUSION_FAMILIES = ("dit",)  # values of model.family
# What a caption says. Sizes are not in every caption, and relations not in those of one object.
SCORED_FACTS = ("background", "colors", "count", "relations", "shapes")
# Sections in which runs of one family and size may differ on purpose: that makes them different settings.
OF_THE_SETTING = ("model", "optim", "objective", "diffusion", "stream", "corpus", "image_tokenizer")


@dataclass(frozen=True)
class ComparedRun:
    """A trained and evaluated run.

    steps: trained. sampling: how it was drawn. facts: by prompt, which of SCORED_FACTS are right. kid: KID of each
    block of pictures, None for too few. floor: KID of the true pictures through the tokenizer. ceiling: share of
    their facts that are right. val_loss: last one, all and by modality, comparable within a family only.
    """

    folder: Path
    config: Config
    family: str
    parameters: int
    steps: int
    ledger: Ledger
    sampling: dict[str, Any]
    prompts: tuple[str, ...]
    facts: tuple[dict[str, bool], ...]
    kid: tuple[float, ...] | None
    extractor: str
    floor: float | None
    ceiling: float | None
    val_loss: dict[str, float]

    @property
    def scores(self) -> np.ndarray:
        """(P,) share of the facts of each prompt that are right."""
        return np.array([sum(facts.values()) / len(facts) for facts in self.facts])


def find_runs(words: Sequence[str]) -> list[Path]:
    """The run directories that the words name: each one, or the folder of a sweep that holds them.

    Raises UserError for a folder that is neither.
    """
    found: list[Path] = []
    for word in words:
        folder = Path(word)
        if (folder / "config.yaml").is_file():
            inside = [folder]
        else:
            inside = sorted(path.parent for path in folder.glob("*/config.yaml"))
        if not inside:
            raise UserError(
                f"{word} is neither a run directory nor a folder of them (there is no config.yaml); give RUN..., or "
                "the folder of a sweep, such as runs/iso_flop"
            )
        found += [path for path in inside if path not in found]
    return found


def read_run(folder: Path) -> ComparedRun | str:
    """The run in `folder`, or the reason why it cannot be compared, as the end of a sentence about it.

    Raises UserError for files that are damaged.
    """
    config = load_frozen(folder / "config.yaml")
    checkpoint = newest(folder / "checkpoints")
    if checkpoint is None or checkpoint.step < config.train.steps:
        at = checkpoint.step if checkpoint else 0
        return f"is at step {at} of {config.train.steps}: the same `mmtrain train` goes on"
    path = folder / EVALUATION
    if not path.is_file():
        return f"was not evaluated: `mmtrain evaluate run={folder} task=shapes`"
    try:
        record = json.loads(path.read_text())
        if "drawn" not in record:
            return f"was evaluated by an older mmtrain: `mmtrain evaluate run={folder} task=shapes` again"
        if record["checkpoint"] != checkpoint.path.name:
            return f"was evaluated at {record['checkpoint']} only: `mmtrain evaluate run={folder} task=shapes` again"
        drawn, distances = record["drawn"], list(record["distances"].values())
        kid = tuple(map(float, distances[0]["blocks"])) if distances else None
        if kid is not None and len(kid) != NUM_BLOCKS:
            raise ValueError(f"{len(kid)} blocks of pictures instead of {NUM_BLOCKS}")
        results: dict[str, dict[str, Any]] = record["results"]
        best = next((shares for title, shares in results.items() if title.startswith("ceiling")), {})
        ceiling = [share for fact, share in best.items() if fact in SCORED_FACTS]
        return ComparedRun(
            folder=folder,
            config=config,
            family=DIFFUSION if config.model.family in DIFFUSION_FAMILIES else TOKENS,
            parameters=sum(math.prod(shape) for shape in checkpoint.shapes.values()),
            steps=checkpoint.step,
            ledger=Ledger.read(folder / "ledger.json"),
            sampling=dict(record["task"]),
            prompts=tuple(str(each["prompt"]) for each in drawn),
            facts=tuple({k: bool(each["facts"][k]) for k in SCORED_FACTS if k in each["facts"]} for each in drawn),
            kid=kid,
            extractor=str(distances[0]["extractor"]) if distances else "",
            floor=float(distances[1]["kid"]) if len(distances) > 1 else None,
            ceiling=sum(p["right"] for p in ceiling) / sum(p["total"] for p in ceiling) if ceiling else None,
            val_loss=_validation_loss(folder),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); evaluate the run again, or leave it out") from error


def _validation_loss(folder: Path) -> dict[str, float]:
    """The last val_loss and val_loss_MODALITY of metrics.jsonl."""
    last: dict[str, float] = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        last.update({k: float(v) for k, v in row.items() if k.startswith("val_loss") and isinstance(v, (int, float))})
    return last


def name_settings(runs: Sequence[ComparedRun], budgets: Sequence[int]) -> list[str]:
    """What each run was trained with, seed aside: its size, and what differs among runs of its size and budget."""
    flat = [_flat(run.config) for run in runs]
    names = []
    for run, budget, settings in zip(runs, budgets, flat, strict=True):
        alike = [
            other
            for other, its_run, its_budget in zip(flat, runs, budgets, strict=True)
            if (its_run.family, its_run.parameters, its_budget) == (run.family, run.parameters, budget)
        ]
        differing = [key for key in sorted(settings) if len({other.get(key) for other in alike}) > 1]
        names.append(", ".join([size_text(run.parameters), *(f"{key}={settings[key]}" for key in differing)]))
    return names


def size_text(parameters: int) -> str:
    """961536 -> "0.96 M"."""
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.2g} M"


def _flat(config: Config) -> dict[str, str]:
    sections = {name: section for name, section in asdict(config).items() if name in OF_THE_SETTING}
    return {f"{name}.{key}": str(value) for name, section in sections.items() for key, value in section.items()}

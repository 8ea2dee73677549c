"""Token models against diffusion models: what the runs support, as numbers and in words."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mmtrain.config import UserError
from mmtrain.evaluate.compared import DIFFUSION, TOKENS, ComparedRun, name_settings
from mmtrain.evaluate.scaling import IDENTITY, Estimate, Scaling, Trial, group_budgets, logit_link, measure_scaling

FORMAT_VERSION = 1
ACCURACY, KID = "attribute accuracy", "KID"


@dataclass(frozen=True)
class Measure:
    """One way to measure quality. reference: of the true pictures through the tokenizer (the best that can be)."""

    name: str
    higher_is_better: bool
    reference: float | None
    scaling: Scaling

    def text(self, value: float) -> str:
        """A value as a person reads it: accuracies in percent."""
        return f"{100 * value:.1f} %" if self.higher_is_better else f"{value:.3f}"

    def difference_text(self, value: float) -> str:
        """A difference of two values, with its sign: of accuracies in points."""
        return f"{100 * value:+.1f} points" if self.higher_is_better else f"{value:+.3f}"


@dataclass(frozen=True)
class Comparison:
    """runs and their settings, in order; budget: of each run. sentences: what can be said, and what cannot."""

    runs: tuple[ComparedRun, ...]
    settings: tuple[str, ...]
    budget: tuple[int, ...]
    measures: tuple[Measure, ...]
    sentences: tuple[str, ...]
    left_out: dict[str, str]

    def grouped(self, by_setting: bool) -> dict[tuple[str, str, int], list[ComparedRun]]:
        """Runs by family, setting ("" unless asked for) and budget."""
        groups: dict[tuple[str, str, int], list[ComparedRun]] = {}
        for run, setting, budget in zip(self.runs, self.settings, self.budget, strict=True):
            groups.setdefault((run.family, setting if by_setting else "", budget), []).append(run)
        return dict(sorted(groups.items()))

    def to_dict(self) -> dict[str, Any]:
        """Contents of comparison.json."""
        return {
            "format_version": FORMAT_VERSION,
            "sentences": list(self.sentences),
            "measures": {
                measure.name: {
                    "higher_is_better": measure.higher_is_better,
                    "true_pictures_through_the_tokenizer": measure.reference,
                    **asdict(measure.scaling),
                }
                for measure in self.measures
            },
            "runs": [
                {
                    "run": str(run.folder),
                    "family": run.family,
                    "setting": setting,
                    "parameters": run.parameters,
                    "seed": run.config.seed,
                    "budget": budget,
                    "steps": run.steps,
                    "training_flops": run.ledger.training_total,
                    "spent_flops": run.ledger.spent_total,
                    "flops": run.ledger.state(),
                    "accuracy": float(run.scores.mean()),
                    "kid": float(np.mean(run.kid)) if run.kid else None,
                    "val_loss": run.val_loss,
                }
                for run, setting, budget in zip(self.runs, self.settings, self.budget, strict=True)
            ],
            "left_out": self.left_out,
        }


def compare_runs(runs: Sequence[ComparedRun], left_out: dict[str, str] | None = None) -> Comparison:
    """Compare evaluated runs. Raises UserError without any, or when they drew other captions than one another."""
    left_out = left_out or {}
    if not runs:
        reasons = "; ".join(f"{name} {reason}" for name, reason in list(left_out.items())[:1])
        raise UserError(f"nothing can be compared, none of the runs was trained and evaluated: {reasons}")
    for run in runs:
        if run.prompts != runs[0].prompts:
            raise UserError(
                f"{run.folder} drew other captions ({len(run.prompts)}) than {runs[0].folder} "
                f"({len(runs[0].prompts)}); evaluate both on the same data with the same task.num_prompts"
            )
    _, budget = group_budgets([float(run.ledger.training_total) for run in runs])
    settings = name_settings(runs, budget)
    floors = [run.floor for run in runs if run.floor is not None]
    ceilings = [run.ceiling for run in runs if run.ceiling is not None]
    scores = [run.scores for run in runs]
    accuracy = measure_scaling(_trials(runs, settings, scores), logit_link(len(scores[0])))
    measures = [Measure(ACCURACY, True, _mean(ceilings), accuracy)]
    blocks = [np.array(run.kid) for run in runs if run.kid]
    if len(blocks) == len(runs):
        kid = measure_scaling(_trials(runs, settings, blocks), IDENTITY, higher_is_better=False)
        measures.append(Measure(f"{KID} ({runs[0].extractor})", False, _mean(floors), kid))
    sentences = [sentence for measure in measures for sentence in say(measure)]
    sentences += _at_the_edge(accuracy, {setting: run.parameters for run, setting in zip(runs, settings, strict=True)})
    return Comparison(tuple(runs), tuple(settings), tuple(budget), tuple(measures), tuple(sentences), left_out)


def _trials(runs: Sequence[ComparedRun], settings: Sequence[str], values: Sequence[np.ndarray]) -> list[Trial]:
    return [
        Trial(run.family, setting, run.config.seed, float(run.ledger.training_total), value)
        for run, setting, value in zip(runs, settings, values, strict=True)
    ]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def say(measure: Measure) -> list[str]:
    """Conclusions that the intervals support, and one sentence for each that cannot be drawn."""
    found = measure.scaling
    if len(found.families) < 2:
        other = DIFFUSION if found.families[0] == TOKENS else TOKENS
        return [f"By {measure.name}: all runs are {found.families[0]}, so there is nothing to say about {other}."]
    if not found.differences:
        return [f"By {measure.name}: no budget has runs of both families, so which one is ahead cannot be said."]
    one, two = found.families[:2]
    sentences = []
    for budget, difference in found.differences.items():
        values = {family: found.envelopes[family][budget] for family in (one, two)}
        at = f"By {measure.name} at {flops_text(found.budgets[budget])} FLOPs"
        is_first = (difference.value > 0) == measure.higher_is_better
        ahead, behind = (one, two) if is_first else (two, one)
        numbers = [measure.text(values[family].value) for family in (ahead, behind)]
        size = Estimate(difference.value, difference.low, difference.high)
        if ahead == two:
            size = Estimate(-difference.value, -difference.high, -difference.low)
        value, low, high = (measure.difference_text(x) for x in (size.value, size.low, size.high))
        interval = f"difference {value}, 95 % interval {low} to {high}"
        if difference.excludes_zero:
            sentences.append(f"{at} {ahead} are ahead: {' against '.join(numbers)} ({interval}).")
        else:
            both = f"{ahead} {numbers[0]}, {behind} {numbers[1]}"
            sentences.append(f"{at} neither family is ahead: {both} ({interval}, which holds 0).")
    sentences.append(_crossing(measure))
    if found.most_seeds < 2:
        sentences.append("There is one seed of everything, so the intervals leave out what another seed would change.")
    return sentences


def _at_the_edge(found: Scaling, parameters: dict[str, int]) -> list[str]:
    """A sentence for each family whose best size is the smallest or largest that was tried: the best lies beyond."""
    sentences = []
    for family in found.families:
        tried: dict[int, set[int]] = {}
        for cell in found.cells:
            if cell.family == family:
                tried.setdefault(cell.budget, set()).add(parameters[cell.setting])
        for end, word, other in ((min, "smallest", "smaller"), (max, "largest", "larger")):
            at = [
                flops_text(found.budgets[budget])
                for budget, setting in found.best[family].items()
                if len(tried[budget]) > 1 and parameters[setting] == end(tried[budget])
            ]
            if at:
                sentences.append(
                    f"The most accurate of the {family} at {' and '.join(at)} FLOPs is the {word} that was tried, so a "
                    f"{other} one may be better still."
                )
    return sentences


def _crossing(measure: Measure) -> str:
    crossing = measure.scaling.crossing
    if crossing is None:
        return (
            f"By {measure.name}: a single budget has runs of both families, so no curve can be fitted to both and "
            "whether they cross cannot be said."
        )
    if crossing.flops is not None:
        at, low, high = (flops_text(x) for x in (crossing.flops.value, crossing.flops.low, crossing.flops.high))
        return (
            f"By {measure.name} the fitted curves cross at {at} FLOPs (95 % interval {low} to {high}; in "
            f"{crossing.share:.0%} of the bootstrap replicates they cross inside the range)."
        )
    return (
        f"By {measure.name}: no crossing inside the range is established (the fitted curves cross there in "
        f"{crossing.share:.0%} of the bootstrap replicates)."
    )


def flops_text(flops: float) -> str:
    """3.04e11 -> "3.0e11"."""
    mantissa, exponent = f"{flops:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"

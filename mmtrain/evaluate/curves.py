"""What guidance and CD-K do to pictures: attribute accuracy on the shapes corpus, setting by setting."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmtrain.documents import Document
from mmtrain.evaluate.intervals import Proportion
from mmtrain.evaluate.shapes import draw_and_grade, shares
from mmtrain.generate import Sampler, SamplingSettings

FACT_COLORS = {
    "background": "#656d76",
    "count": "#7a8a4f",
    "colors": "#c8772e",
    "relations": "#2f6f9f",
    "shapes": "#8e4585",
}


@dataclass(frozen=True)
class Curve:
    """Shares of pictures that are right, by fact, for each value of one setting."""

    setting: str
    points: Mapping[float, Mapping[str, Proportion]]


def measure_curve(
    sampler: Sampler, documents: Sequence[Document], setting: str, settings: Mapping[float, SamplingSettings], seed: int
) -> Curve:
    """Draw the captions of `documents` with every one of `settings` (by the value of the setting) and grade them.

    The same seed draws with all settings: what differs between two points is the setting alone.
    """
    points = {}
    for value, each in settings.items():
        points[value] = shares([facts for _, _, facts in draw_and_grade(sampler, documents, each, seed)])
    return Curve(setting, points)


def draw_curves(curves: Sequence[Curve], subtitle: str) -> bytes:
    """SVG with one panel per curve; bands are 95 % intervals."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(curves), 4.2), facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for panel, curve in zip(panels, curves, strict=True):
        values = list(curve.points)
        for fact, color in FACT_COLORS.items():
            proportions = [curve.points[value][fact] for value in values]
            panel.plot(values, [100 * p.share for p in proportions], "o-", color=color, markersize=4, label=fact)
            low, high = ([100 * getattr(p, end) for p in proportions] for end in ("low", "high"))
            panel.fill_between(values, low, high, color=color, alpha=0.15, linewidth=0)
        panel.set_xlabel(curve.setting)
        panel.grid(color="#eaedf0")
        panel.set_axisbelow(True)
    panels[0].set_ylabel("pictures that are right (%)")
    panels[-1].legend(frameon=False, fontsize=9, loc="center right")
    figure.suptitle(subtitle, fontsize=10)
    file = io.BytesIO()
    # Without ids drawn at random and without a date the same numbers give the same file.
    with rc_context({"svg.hashsalt": "mmtrain"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()

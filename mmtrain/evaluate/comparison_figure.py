"""Quality against training compute of both families: every size, the envelope, its fit and the intervals."""

import io

from mmtrain.evaluate.compared import TOKENS
from mmtrain.evaluate.comparison import Comparison, Measure
from mmtrain.flops.compare import DIFFUSION_COLOR, INK, TOKEN_COLOR

MARKERS = "ovs^DP*X"
SOFT = "#666d73"


def quality_figure(comparison: Comparison) -> bytes:
    """PNG with one panel per measure. Small hollow markers: a size at a budget, mean of its seeds; large ones: the
    best size; lines and bands: fit of the best sizes with its 95 % interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(comparison.measures), 5.4), dpi=150, facecolor="white")
    panels = figure.subplots(1, len(comparison.measures), squeeze=False)[0]
    for panel, measure in zip(panels, comparison.measures, strict=True):
        _draw(panel, measure)
    figure.suptitle("Quality against training compute", x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK)
    run = comparison.runs[0]
    seeds = max(measure.scaling.most_seeds for measure in comparison.measures)
    note = (
        f"{len(comparison.runs)} runs on the corpus {run.config.corpus.name}, up to {seeds} seeds of each; "
        f"{len(run.prompts)} held-out captions, one picture each. FLOPs: training_total of each run's ledger "
        "(3 x forward of the trained network; frozen parts excluded).\nBars and bands: 95 % bootstrap intervals over "
        "captions and seeds. Lines: fits of each family's best sizes. Filled: the best at a budget; hollow: the others."
    )
    figure.text(0.01, 0.012, note, fontsize=7.5, color=SOFT, linespacing=1.5)
    figure.tight_layout(rect=(0, 0.055, 1, 1))
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _draw(panel, measure: Measure) -> None:
    found, scale = measure.scaling, 100 if measure.higher_is_better else 1
    for family in found.families:
        color = TOKEN_COLOR if family == TOKENS else DIFFUSION_COLOR
        cells = [cell for cell in found.cells if cell.family == family]
        sizes = list(dict.fromkeys(cell.setting for cell in sorted(cells, key=_size)))
        for cell in cells:
            is_best = found.best[family][cell.budget] == cell.setting
            q, place = cell.quality, sizes.index(cell.setting)
            # Equal budgets would lie on one another: apart by a few percent, by family and size.
            x = cell.flops * (1 + 0.022 * (place - (len(sizes) - 1) / 2)) * (0.985 if family == TOKENS else 1.015)
            panel.errorbar(
                x, scale * q.value, yerr=[[scale * (q.value - q.low)], [scale * (q.high - q.value)]],
                fmt=MARKERS[place % len(MARKERS)], color=color, elinewidth=1.4 if is_best else 0.7,
                markersize=7 if is_best else 5, markerfacecolor=color if is_best else "white",
                alpha=1 if is_best else 0.75,
            )  # fmt: skip
        if family in found.fits:
            along = [flops for flops, _ in found.fits[family].curve]
            fitted = [estimate for _, estimate in found.fits[family].curve]
            middle, low, high = ([scale * getattr(e, end) for e in fitted] for end in ("value", "low", "high"))
            panel.plot(along, middle, color=color, linewidth=1.8, label=f"{family}, best size")
            panel.fill_between(along, low, high, color=color, alpha=0.14, linewidth=0)
        for number, size in enumerate(sizes):
            marker = MARKERS[number % len(MARKERS)]
            panel.plot([], [], marker, color=color, markerfacecolor="white", markersize=5, label=f"{family}, {size}")
    if measure.reference is not None:
        label = "true pictures through the tokenizer"
        panel.axhline(scale * measure.reference, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), label=label)
    panel.set_xscale("log")
    better = "higher" if measure.higher_is_better else "lower"
    unit = ", %" if measure.higher_is_better else ""
    panel.set_xlabel("Training compute (FLOPs)", color=INK)
    panel.set_ylabel(f"{measure.name}{unit} ({better} is better)", color=INK)
    panel.grid(True, which="major", color="#e6e8ea", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(which="both", colors=INK, labelsize=9)
    panel.legend(frameon=False, fontsize=7.5, loc="best")


def _size(cell) -> float:
    """Sizes in the order of their parameters: "0.96 M" before "1.1 M"."""
    number, unit = cell.setting.split(",")[0].split()
    return float(number) * (1e3 if unit == "B" else 1)

"""A scaling ladder in three panels: loss against FLOPs, loss against size, the compute-optimal size against FLOPs."""

import io
from collections.abc import Sequence

import numpy as np

from mmtrain.evaluate.loss_law import LawFit, Point, budgets
from mmtrain.flops.compare import INK, TOKEN_COLOR

SOFT = "#666d73"


def scaling_figure(
    points: Sequence[Point], loss: str, fit: LawFit, predicted: Sequence[tuple[Point, float]] | None
) -> bytes:
    """PNG. predicted: what the fit without the largest budget says of its runs."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 5.4), dpi=130, facecolor="white")
    frontier, sizes_panel, optimum = figure.subplots(1, 3)
    colors = matplotlib.colormaps["viridis"]
    law, groups = fit.law, budgets(points)
    low, high = min(p.flops for p in points), max(p.flops for p in points)
    along = np.geomspace(low / 1.5, high * 3, 60)

    sizes = sorted({point.parameters for point in points})
    for number, size in enumerate(sizes):
        color = colors(0.9 * number / max(1, len(sizes) - 1))
        mine = sorted((p for p in points if p.parameters == size), key=lambda p: p.flops)
        per_token = np.median([p.flops / p.tokens for p in mine])
        frontier.plot(along, law.loss(size, along / per_token), color=color, linewidth=1)
        frontier.plot([p.flops for p in mine], [p.losses[loss] for p in mine], "o", color=color, label=_short(size))
    best_n, best_d = law.optimal(along)
    frontier.plot(along, law.loss(best_n, best_d), "--", color=INK, linewidth=1.6, label="best size (fit)")
    frontier.set(xscale="log", xlabel="training FLOPs", ylabel=f"{loss} (nats per token)", title="Loss by size")
    frontier.legend(title="parameters N", fontsize=8, frameon=False)

    span = np.geomspace(sizes[0] / 1.5, sizes[-1] * 1.5, 60)
    for number, group in enumerate(groups):
        color = colors(0.9 * number / max(1, len(groups) - 1))
        flops = float(np.median([p.flops for p in group]))
        sizes_panel.plot(span, law.loss(span, flops / (law.per_token * span)), color=color, linewidth=1)
        x = [p.parameters for p in group]
        sizes_panel.plot(x, [p.losses[loss] for p in group], "o", color=color, label=f"{flops:.1e}")
    if predicted:
        x = [p.parameters for p, _ in predicted]
        label = "predicted without\nthe largest budget"
        sizes_panel.plot(x, [value for _, value in predicted], "x", color="crimson", markersize=8, label=label)
    sizes_panel.set(xscale="log", xlabel="parameters N", ylabel=f"{loss} (nats per token)", title="Loss by budget")
    sizes_panel.set_xticks(sizes, [_short(size) for size in sizes])
    sizes_panel.tick_params(axis="x", which="minor", labelbottom=False)
    sizes_panel.legend(title="FLOPs", fontsize=8, frameon=False)

    replicates = np.array([one.optimal(along)[0] for one in fit.replicates])
    optimum.fill_between(along, *np.percentile(replicates, (2.5, 97.5), axis=0), color=TOKEN_COLOR, alpha=0.15)
    optimum.plot(along, best_n, color=TOKEN_COLOR, label="N(C) of the fit, 95 % interval")
    winners = [min(group, key=lambda p: p.losses[loss]) for group in groups]
    optimum.plot(
        [p.flops for p in winners], [p.parameters for p in winners], "o", color=INK, label="best size measured"
    )
    optimum.set(
        xscale="log", yscale="log", xlabel="training FLOPs C", ylabel="parameters N", title="Compute-optimal size"
    )
    optimum.set_ylim(sizes[0] / 4, sizes[-1] * 8)
    optimum.legend(fontsize=8, frameon=False)
    for panel in (frontier, sizes_panel, optimum):
        panel.grid(alpha=0.25, which="both", linewidth=0.5)
        panel.title.set_fontsize(11)
    terms = f"{law.E:.3f} + {law.A:.3g} / N^{law.alpha:.3f} + {law.B:.3g} / D^{law.beta:.3f}"
    note = (
        f"{len(points)} runs. L(N, D) = {terms}. N: parameters in matrix products, output head included; D: tokens "
        "trained on; FLOPs: training_total of each run's ledger. Lines: the fit to all runs."
    )
    figure.text(0.01, 0.015, note, fontsize=8, color=SOFT)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _short(number: float) -> str:
    """3.2k, 45M, 7B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"

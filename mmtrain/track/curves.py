"""Loss curves as one picture."""

import io
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

TOTAL, TEXT, IMAGE, SPECIAL, SOFT = "#33383d", "#2f6f9f", "#c8772e", "#7a8a4f", "#656d76"
SMOOTH_FROM = 60  # points; fewer are drawn as they are
RUNS = (TEXT, IMAGE, "#b3262e", SPECIAL, "#6b4c9a", "#3aa6a0", "#d4a017", "#a0587c", TOTAL, "#8c6d46")
START = 0.03  # of the x axis: the fall of the loss there does not set the scale


def series(rows: Sequence[Mapping[str, Any]], key: str, x_key: str) -> tuple[list[float], list[float]]:
    """(x, y) of the rows that have both numbers."""
    pairs = [(row[x_key], row[key]) for row in rows if row.get(x_key) is not None and row.get(key) is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean over a centered window, narrower at the ends."""
    half, last = window // 2, len(values)
    sums = [0.0, *accumulate(values)]
    ends = ((max(0, index - half), min(last, index + half + 1)) for index in range(last))
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def loss_curves(rows: Sequence[Mapping[str, Any]], unit: str = "nats per token") -> bytes | None:
    """PNG with four panels: loss, loss by modality, gradient norm and learning rate, speed; None without losses.

    rows: of `read_metrics`. Dots with a line are validation. The x axis is tokens where rows have them.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    x_key = "tokens" if any(row.get("tokens") is not None for row in rows) else "step"
    if not series(rows, "loss", x_key)[0] and not series(rows, "val_loss", x_key)[0]:
        return None

    figure = Figure(figsize=(11, 6.4), dpi=150, facecolor="white", layout="constrained")
    panels = figure.subplots(2, 2)

    def curve(axes, key, color, label, style="-"):
        x, y = series(rows, key, x_key)
        if not x:
            return
        if len(x) >= SMOOTH_FROM:
            axes.plot(x, y, color=color, linewidth=0.7, alpha=0.3)
            y = smoothed(y, max(3, len(y) // 40))
        axes.plot(x, y, style, color=color, linewidth=1.7, label=label, marker="o" if len(x) == 1 else None)

    def points(axes, key, color, label):
        x, y = series(rows, key, x_key)
        if x:
            axes.plot(x, y, ":", color=color, linewidth=1.2, marker="o", markersize=4.5, label=label)

    losses, modalities, optimizer, speed = panels.flat
    curve(losses, "loss", TOTAL, "training")
    points(losses, "val_loss", "#b3262e", "validation")
    losses.set_title(f"Loss ({unit})")
    for name, color in (("text", TEXT), ("image", IMAGE)):
        curve(modalities, f"loss_{name}", color, name)
        points(modalities, f"val_loss_{name}", color, f"{name}, validation")
    modalities.set_title(f"Loss by modality ({unit})")
    curve(optimizer, "grad_norm", SPECIAL, "gradient norm")
    optimizer.set_title("Gradient norm, learning rate")
    rate = optimizer.twinx()
    curve(rate, "lr", SOFT, "learning rate", "--")
    rate.spines[["top", "left"]].set_visible(False)
    rate.tick_params(labelsize=8, colors=SOFT)
    curve(speed, "tokens_per_second", TEXT, "tokens per second")
    speed.set_title("Tokens per second")
    speed.set_ylim(bottom=0)
    for axes in panels.flat:
        axes.grid(True, color="#e6e8ea", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top"]].set_visible(False)
        axes.spines[["right"]].set_visible(axes is optimizer)
        axes.tick_params(labelsize=8)
        axes.title.set_fontsize(10.5)
        axes.set_xlabel("tokens" if x_key == "tokens" else "step", fontsize=8.5, color=SOFT)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        lines = axes.get_legend_handles_labels()
        if axes is optimizer:
            lines = tuple(one + other for one, other in zip(lines, rate.get_legend_handles_labels(), strict=True))
        if lines[0]:
            axes.legend(*lines, frameon=False, fontsize=8.5)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def run_colors(number: int) -> list[str]:
    """A color for each of so many runs; beyond ten, in the order of the rainbow."""
    if number <= len(RUNS):
        return list(RUNS[:number])
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["turbo"](0.05 + 0.9 * index / (number - 1))) for index in range(number)]


def overlay(runs: Sequence[Sequence[Mapping[str, Any]]], key: str, x_key: str, label: str) -> bytes | None:
    """PNG of one number of several runs over another, in `run_colors`; None where no run has both.

    runs: rows of `read_metrics` of each; label: of the x axis.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    lines = [series(rows, key, x_key) for rows in runs]
    if not any(x for x, _ in lines):
        return None
    figure = Figure(figsize=(4.8, 3.1), dpi=200, facecolor="white", layout="constrained")
    axes = figure.subplots()
    shown = _power if "flops" in x_key else _short
    longest = max(x[-1] for x, _ in lines if x)
    settled: list[float] = []
    for (x, y), color in zip(lines, run_colors(len(lines)), strict=True):
        if len(x) >= SMOOTH_FROM:
            axes.plot(x, y, color=color, linewidth=0.5, alpha=0.2)
            y = smoothed(y, max(3, len(y) // 40))
        few = len(x) < SMOOTH_FROM // 2
        axes.plot(x, y, color=color, linewidth=1.7, marker="o" if few else None, markersize=4)
        settled += [value for at, value in zip(x, y, strict=True) if at >= START * longest]
    low, high = min(settled), max(settled)
    margin = 0.06 * (high - low) or 0.01 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.grid(True, color="#e6e8ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)
    axes.set_xlabel(label, fontsize=10, color=SOFT)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _power(value: float) -> str:
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"

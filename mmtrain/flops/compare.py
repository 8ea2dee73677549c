"""Training compute of our runs beside that of published models: one picture and one table.

Only numbers that were checked against a source are shown, and no FID is invented for our own runs: they
are marks on the compute axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmtrain.flops.registry import Baseline, load_registry

TOKEN_COLOR, DIFFUSION_COLOR, OWN_COLOR, INK = "#2f6f9f", "#c8772e", "#b3262e", "#33383d"
FOOTNOTE = (
    "FLOPs of training, 1 multiply-add = 2 FLOPs, 3 x forward of the trained network; frozen encoders and tokenizers "
    "excluded.\nHollow: a bound, the 6ND rule, an assumed utilization, or part of the model only. FID: zero-shot "
    "MS-COCO 30k as printed; retrieval,\nguidance and the number of re-ranked samples differ between papers (CM3leon: "
    "2 retrieved documents, best of 8), so vertical distances are rough."
)


@dataclass(frozen=True)
class OwnRun:
    """One of our runs: its name and its total training FLOPs (the ledger's training_total)."""

    name: str
    flops: int


@dataclass(frozen=True)
class ComputeRow:
    """One line of the table: training FLOPs, times as much as the (first) own run, and where it comes from."""

    name: str
    family: str
    flops: float
    ratio: float | None
    reservation: str
    fid: float | None
    fid_note: str
    source: str
    own: bool


def compute_table(own: Sequence[OwnRun], baselines: Sequence[Baseline] | None = None) -> list[ComputeRow]:
    """Our runs and all published models with checked training compute, by rising FLOPs.

    `ratio` is relative to the first own run; None without one, or when it has spent nothing.
    """
    reference = own[0].flops if own else 0
    rows = [
        ComputeRow(
            run.name,
            "mmtrain",
            float(run.flops),
            run.flops / reference if reference else None,
            "",
            None,
            "",
            "ledger",
            True,
        )
        for run in own
    ]
    for baseline in load_registry() if baselines is None else baselines:
        if baseline.training_compute is None:
            continue
        quantity, reservation = baseline.training_compute
        fid, flops = baseline.best_fid, quantity.number
        settings = (fid.note, baseline.fid_settings) if fid else ()
        fid_note = "; ".join(part for part in settings if part and "from memory" not in part)
        ratio = flops / reference if reference else None
        value = fid.number if fid else None
        rows.append(
            ComputeRow(
                baseline.name, baseline.family, flops, ratio, reservation, value, fid_note, quantity.source, False
            )
        )
    return sorted(rows, key=lambda row: row.flops)


def comparison_figure(own: Sequence[OwnRun], out: Path, baselines: Sequence[Baseline] | None = None) -> Path:
    """Draw published models by training FLOPs and zero-shot COCO FID, our runs on the compute axis; PNG at `out`."""
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    baselines = load_registry() if baselines is None else baselines
    points = [(b, *b.training_compute, b.best_fid) for b in baselines if b.training_compute and b.best_fid]
    runs = [run for run in own if run.flops > 0]

    figure = Figure(figsize=(11, 6.6), dpi=150, facecolor="white")
    axes = figure.add_axes((0.065, 0.2, 0.915, 0.71))
    axes.set(
        xscale="log", yscale="log", xlabel="Training compute (FLOPs)", ylabel="Zero-shot COCO FID (lower is better)"
    )
    values = [quantity.number for _, quantity, _, _ in points] + [float(run.flops) for run in runs]
    fids = [point[-1].number for point in points]
    axes.set_xlim(min(values, default=1e20) / 6, max(values, default=1e24) * 6)
    axes.set_ylim(min(fids, default=4) / 1.25, max(fids, default=30) * 1.25 * 1.12 ** len(runs))
    ticks = [tick for tick in (3, 4, 5, 7, 10, 15, 20, 30, 50) if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.yaxis.set_minor_locator(_no_ticks())
    axes.grid(True, which="major", color="#e6e8ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)

    labels = []
    for baseline, quantity, reservation, fid in points:
        color = TOKEN_COLOR if baseline.is_token_model else DIFFUSION_COLOR
        x, y = quantity.number, fid.number
        axes.plot(
            x, y, "o", markersize=7, color=color, markerfacecolor="white" if reservation else color, markeredgewidth=1.6
        )
        labels.append((x, y, baseline.name.split(" (")[0], color))
    _place_labels(figure, axes, labels)
    for row, run in enumerate(runs):
        x = float(run.flops)
        axes.axvline(x, color=OWN_COLOR, linewidth=1.6, linestyle=(0, (5, 3)))
        mantissa, exponent = f"{x:.1e}".split("e")
        text = f"{'this run' if len(runs) == 1 else run.name}: {mantissa}e{int(exponent)} FLOPs"
        right = axes.transLimits.transform(axes.transScale.transform((x, 10)))[0] > 0.7
        axes.annotate(
            text, (x, 1 - 0.05 * row), xycoords=("data", "axes fraction"), xytext=(-6 if right else 6, -4),
            textcoords="offset points", ha="right" if right else "left", va="top", color=OWN_COLOR, fontsize=10.5,
            fontweight="bold", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
    for label, color in (("token models", TOKEN_COLOR), ("diffusion models", DIFFUSION_COLOR)):
        axes.plot([], [], "o", color=color, markersize=7, label=label)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=10)
    figure.text(
        0.065, 0.945, "Training compute of published text-to-image models", fontsize=14, fontweight="bold", color=INK
    )
    figure.text(0.065, 0.022, FOOTNOTE, fontsize=8, color="#666d73", linespacing=1.5)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", metadata={"Software": None})
    return out


def _no_ticks():
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _place_labels(figure, axes, labels) -> None:
    """Write each label at the side of its point where it covers fewest points and labels already written."""
    from matplotlib.transforms import Bbox

    renderer = figure.canvas.get_renderer() if hasattr(figure.canvas, "get_renderer") else None
    pixels = axes.transData.transform([(x, y) for x, y, _, _ in labels]) if labels else []
    taken = [Bbox.from_bounds(px - 9, py - 9, 18, 18) for px, py in pixels]
    sides = [(9, 0, "left", "center"), (-9, 0, "right", "center"), (0, 9, "center", "bottom"), (0, -9, "center", "top")]
    sides += [(7, 7, "left", "bottom"), (7, -7, "left", "top"), (-7, 7, "right", "bottom"), (-7, -7, "right", "top")]
    inside = axes.get_window_extent(renderer)
    for x, y, text, color in labels:
        candidates = []
        for dx, dy, ha, va in sides:
            label = axes.annotate(
                text, (x, y), xytext=(dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=9, color=color
            )
            box = label.get_window_extent(renderer)
            outside = not (inside.x0 <= box.x0 and box.x1 <= inside.x1)
            candidates.append((sum(_overlap(box, other) for other in taken) + 1e6 * outside, label, box))
        best = min(candidates, key=lambda candidate: candidate[0])
        for candidate in candidates:
            if candidate is not best:
                candidate[1].remove()
        taken.append(best[2])


def _overlap(one, other) -> float:
    """Shared area of two boxes in square pixels."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, width) * max(0.0, height)

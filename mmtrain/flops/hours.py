"""Published training hours beside counted FLOPs: what utilization the two imply together.

Hours of different papers are no common measure of compute: SD 1.x's are at 4 % of the chip's peak, Chameleon's at 40 %.
So the axis is FLOPs at one utilization for all, and published hours stand beside it, hollow, with what they imply.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmtrain.flops.compare import DIFFUSION_COLOR, INK, OWN_COLOR, TOKEN_COLOR
from mmtrain.flops.registry import Baseline, Quantity, load_accelerators, load_registry

REFERENCE_MFU = 0.40  # Chameleon-7B and 34B: 40.2 % and 39.0 % from published hours and tokens
REFERENCE_CHIP = "A100"
PLAUSIBLE_MFU = (0.05, 0.65)
HOURS_KEYS = ("hours", "hours_128", "hours_total_lower")
IMPLIED_KEYS = ("implied_mfu", "implied_mfu_6nd", "implied_mfu_total_128")
CHIPS = {"A100-hours": "A100", "H100-hours": "H100-SXM", "TPUv4 chip-hours": "TPUv4", "V100-hours": "V100-SXM"}


@dataclass(frozen=True)
class HoursRow:
    """A published model on the axis of A100-hours.

    counted: hours that its counted FLOPs take at 40 % of an A100's peak; None when they are known from hours only.
    published: its published hours, in A100-hours of equal peak FLOPs; None when there are none. mfu: what both imply.
    """

    name: str
    is_token_model: bool
    counted: float | None
    reservation: str
    published: float | None
    published_text: str
    mfu: float | None
    source: str

    @property
    def flag(self) -> str:
        """Why the published hours are no measure of compute; "" when they may be."""
        if self.mfu is None:
            return ""
        low, high = PLAUSIBLE_MFU
        return "below 5 %" if self.mfu < low else "above 65 %" if self.mfu > high else ""


def reference_hours(flops: float) -> float:
    """A100-hours of `flops` at 40 % of peak: the same constant for all models."""
    return flops / (REFERENCE_MFU * load_accelerators()[REFERENCE_CHIP].number * 3600)


def hours_table(baselines: Sequence[Baseline] | None = None) -> list[HoursRow]:
    """Published models with counted FLOPs or published hours that were checked, by rising compute."""
    peaks = {name: quantity.number for name, quantity in load_accelerators().items()}
    rows = []
    for baseline in load_registry() if baselines is None else baselines:
        compute, reservation = baseline.training_compute or (None, "")
        if compute is not None and "hours" in compute.formula:
            compute, reservation = None, ""  # not counted: taken from the very hours
        hours = _first(baseline, "hardware", HOURS_KEYS)
        if hours is not None and hours.unit not in CHIPS:
            hours = None
        if compute is None and hours is None:
            continue
        implied = _first(baseline, "compute", IMPLIED_KEYS)
        published, mfu, text = None, None, ""
        if hours is not None:
            peak = peaks[CHIPS[hours.unit]]
            published = hours.number * peak / peaks[REFERENCE_CHIP]
            text = f"{hours.number:,.0f} {hours.unit}"
            if compute is not None:
                mfu = implied.number if implied else compute.number / (hours.number * 3600 * peak)
        rows.append(
            HoursRow(
                baseline.name.split(" (")[0],
                baseline.is_token_model,
                reference_hours(compute.number) if compute else None,
                reservation,
                published,
                text,
                mfu,
                hours.source if hours is not None else compute.source if compute else "",
            )
        )
    return sorted(rows, key=lambda row: row.counted or row.published or 0.0)


def _first(baseline: Baseline, group: str, keys: Sequence[str]) -> Quantity | None:
    """The first of the quantities that was checked."""
    found = (baseline.quantities.get(f"{group}.{key}") for key in keys)
    return next((quantity for quantity in found if quantity is not None and quantity.citable), None)


def hours_figure(out: Path, own_flops: Sequence[float] = (), baselines: Sequence[Baseline] | None = None) -> Path:
    """Draw `hours_table` as rows: counted FLOPs filled, published hours hollow with the implied MFU; PNG at `out`.

    own_flops: training FLOPs of own runs, named in the note (far outside the axis).
    """
    from matplotlib.figure import Figure

    rows = hours_table(baselines)
    figure = Figure(figsize=(11, 1.7 + 0.3 * len(rows)), dpi=150, facecolor="white")
    bottom, height = 1.05 / figure.get_figheight(), (figure.get_figheight() - 1.7) / figure.get_figheight()
    axes = figure.add_axes((0.26, bottom, 0.72, height))
    for y, row in enumerate(rows):
        color = TOKEN_COLOR if row.is_token_model else DIFFUSION_COLOR
        both = [x for x in (row.counted, row.published) if x is not None]
        if len(both) == 2:
            axes.plot(both, [y, y], color=color, linewidth=1, alpha=0.5, zorder=1)
        if row.counted is not None:
            face = "white" if row.reservation else color
            axes.plot(row.counted, y, "D" if row.reservation else "s", color=color, markerfacecolor=face, markersize=6)
        if row.published is not None:
            axes.plot(row.published, y, "o", color=color, markerfacecolor="white", markersize=9, zorder=1)
            implied = "no operation count" if row.mfu is None else f"MFU {100 * row.mfu:.1f} %"
            axes.annotate(
                f"{row.published_text}: {implied}" + (f", {row.flag}" if row.flag else ""), (max(both), y),
                xytext=(10, 0), textcoords="offset points", va="center", fontsize=8,
                color=OWN_COLOR if row.flag else "#555b61",
            )  # fmt: skip
    axes.set_xscale("log")
    values = [x for row in rows for x in (row.counted, row.published) if x is not None]
    axes.set_xlim(min(values, default=1) / 2, max(values, default=10) * 60)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    names = [f"{row.name} ({row.reservation})" if row.reservation else row.name for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8.5, color=INK)
    axes.set_xlabel("A100-hours", color=INK)
    axes.grid(True, axis="x", which="major", color="#e6e8ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for label, marker, face, color in (
        ("counted FLOPs at 40 % MFU", "s", INK, INK),
        ("the same, with a reservation", "D", "white", INK),
        ("published hours, implied MFU", "o", "white", INK),
        ("token models", "s", TOKEN_COLOR, TOKEN_COLOR),
        ("diffusion models", "s", DIFFUSION_COLOR, DIFFUSION_COLOR),
    ):
        axes.plot([], [], marker, color=color, markerfacecolor=face, label=label)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=5, frameon=False, fontsize=8)
    figure.text(
        0.01, 1 - 0.28 / figure.get_figheight(), "Training compute in A100-hours at 40 % MFU, and published hours",
        fontsize=13, fontweight="bold", color=INK,
    )  # fmt: skip
    peak = load_accelerators()[REFERENCE_CHIP].number
    note = (
        f"Counted FLOPs / (0.40 x {peak / 1e12:.0f}e12 x 3600), one constant for all (0.40: what Chameleon reached). "
        "Published hours of other chips are scaled by their dense bf16 peaks.\nRed: below 5 % or above 65 % of peak: "
        "the hours do not measure the compute. Every source: `mmtrain flops show ID`; nothing is from memory only."
    )
    if own_flops:
        seconds = 3600 * reference_hours(max(own_flops))
        note += f"\nThe largest of our runs: {seconds:.2g} A100-seconds."
    figure.text(0.01, 0.018, note, fontsize=8, color="#666d73", linespacing=1.5)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", metadata={"Software": None})
    return out

"""`mmtrain flops`: training compute of published models, of a configuration, of diffusion networks, and of runs."""

import os
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmtrain.config import UserError
from mmtrain.config.suggest import did_you_mean, nearest

WIDTH_OF_FILES = 160
FLAGS = "text: in the source; secondary: elsewhere; measured: on torch's meta device; computed: from those"


def main(argv: list[str]) -> int:
    """ls | show NAME | count MODEL [settings] | compare RUN... | run=FOLDER...; see `mmtrain flops --help`."""
    from mmtrain.verbs.flops_count import count
    from mmtrain.verbs.flops_run import show_runs

    word, *rest = argv or ["ls"]
    if word == "ls" and not rest:
        return _list()
    if word == "show" and len(rest) == 1:
        return _show(rest[0])
    if word == "count":
        return count(rest)
    if word == "compare":
        return _compare(rest)
    if all(argument.startswith("run=") for argument in argv):
        return show_runs([Path(argument.partition("=")[2]) for argument in argv])
    raise UserError(f"`mmtrain flops {' '.join(argv)}` means nothing; see `mmtrain flops --help`")


def _list() -> int:
    """One line per published model, by rising training compute; those without a checked figure last."""
    from mmtrain.flops import load_registry

    table = new_table("id", "model", "family", "training FLOPs", "convention", "remark", "checked", "best FID")
    known = [(baseline, baseline.training_compute) for baseline in load_registry(text_models=True)]
    for baseline, compute in sorted(known, key=lambda pair: pair[1][0].number if pair[1] else float("inf")):
        nothing = "undisclosed" if baseline.is_undisclosed else "no checked figure"
        table.add_row(
            baseline.id,
            baseline.name,
            baseline.family.replace("_", " "),
            f"{compute[0].number:.2e}" if compute else nothing,
            baseline.convention,
            compute[1] if compute and compute[1] != baseline.convention else "",
            compute[0].verified if compute else "",
            f"{baseline.best_fid.number:.2f}" if baseline.best_fid else "",
        )
    print_table(table)
    print("\n1 multiply-add = 2 FLOPs. FID: zero-shot COCO 30k, lowest of each paper; settings differ.")
    print(f"{FLAGS}. From memory alone: never shown here.")
    print("`mmtrain flops show ID` prints every number of a model with its source.")
    return 0


def _show(name: str) -> int:
    """Every number of one published model with its provenance, and what its hours and FLOPs imply together."""
    from mmtrain.flops import load_registry
    from mmtrain.flops.hours import hours_table, reference_hours

    baselines = {baseline.id: baseline for baseline in load_registry(text_models=True)}
    if name not in baselines:
        close = nearest(name, baselines)
        raise UserError(
            f"{name} is not a published model that mmtrain knows; "
            + (did_you_mean(close) if close else "`mmtrain flops ls` lists them")
        )
    baseline = baselines[name]
    print(f"{baseline.name}  ({baseline.family.replace('_', ' ')}, {baseline.modality})")
    if baseline.is_undisclosed:
        print("undisclosed: its makers published neither size, data nor training compute; mmtrain does not guess")
    for quantity in (*baseline.quantities.values(), *baseline.fids):
        value = f"{quantity.value:,}" if isinstance(quantity.value, int) else str(quantity.value)
        print(f"\n{quantity.path} = {value} {quantity.unit}".rstrip())
        print(f"    {quantity.kind}, checked: {quantity.verified}; {quantity.source}")
        for label, text in (("formula", quantity.formula), ("note", quantity.note)):
            if text:
                print(f"    {label}: {text}")
    if baseline.training_compute:
        flops = baseline.training_compute[0].number
        print(f"\n{flops:.3e} FLOPs ({baseline.convention}) = {reference_hours(flops):,.0f} A100-hours at 40 % MFU")
    for row in hours_table([baseline]):
        if row.mfu is not None:
            flag = f": {row.flag}, no measure of compute" if row.flag else ""
            print(f"its published {row.published_text} imply {100 * row.mfu:.1f} % MFU{flag}")
    return 0


def _compare(folders: list[str]) -> int:
    """Runs beside published models by rising training compute, each figure with its convention and flags."""
    from mmtrain.flops import load_registry, read_account
    from mmtrain.flops.hours import hours_table, reference_hours
    from mmtrain.verbs.flops_run import runs_in

    if not folders:
        raise UserError("`mmtrain flops compare RUN...` needs the folder of a run, such as runs/quickstart")
    runs = runs_in([Path(folder.removeprefix("run=")) for folder in folders])
    own = {os.path.relpath(run): read_account(run).ledger.training_total for run in runs}
    reference = max(1, next(iter(own.values())))
    first = next(iter(own))
    columns = ("model", "training FLOPs", "convention", f"x {first}", "A100-hours at 40 % MFU", "published hours")
    table = new_table(*columns, "implied MFU", "checked", "remark", "FID")
    rows = [
        (float(flops), f"[bold]{name}[/bold]", "3 x forward, causal half", "", "", "ledger", "", "")
        for name, flops in own.items()
    ]
    for baseline in load_registry(text_models=True):
        if baseline.training_compute is None:
            continue
        quantity, reservation = baseline.training_compute
        hours = next(iter(hours_table([baseline])), None)
        implied = "" if hours is None or hours.mfu is None else f"{100 * hours.mfu:.1f} % {hours.flag}".strip()
        remark = "" if reservation == baseline.convention else reservation
        fid = f"{baseline.best_fid.number:.2f}" if baseline.best_fid else ""
        published = hours.published_text if hours else ""
        shown = (baseline.name, baseline.convention, published, implied, quantity.verified, remark, fid)
        rows.append((quantity.number, *shown))
    for flops, name, convention, published, implied, checked, remark, fid in sorted(rows):
        ratio, hours_40 = f"{flops / reference:.3g}", f"{reference_hours(flops):,.3g}"
        table.add_row(name, f"{flops:.2e}", convention, ratio, hours_40, published, implied, checked, remark, fid)
    print_table(table)
    print(
        "\n1 multiply-add = 2 FLOPs; training of the network alone, frozen parts excluded; ledgers: packed documents "
        f"apart.\n{FLAGS}.\n6ND leaves attention out: worth up to 2 x for small models. Implied MFU below 5 % or above "
        "65 %: such hours are no measure of compute.\nFID: zero-shot COCO 30k, settings differ; none is computed here."
    )
    return 0


def new_table(*headings: str) -> Table:
    """A table without lines, whose first column is never folded."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, no_wrap=number == 0 or heading in ("training FLOPs", "best FID"))
    return table


def print_table(table: Table) -> None:
    """Print for the terminal, or for a file or pipe, which has no width."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_OF_FILES
    console.print(table)


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Indented lines of a label and a value."""
    for label, value in rows:
        print(f"  {label:<46}{value}")

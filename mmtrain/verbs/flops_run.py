"""`mmtrain flops run=FOLDER`: the books of runs, audited; totals per run, per experiment and with base models."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from mmtrain.config import UserError
from mmtrain.flops import BOOKS, Account, Ledger, read_account
from mmtrain.flops.journal import JOURNAL, LEDGER
from mmtrain.flops.ledger import CONVENTIONS
from mmtrain.flops.lineage import lineage_total
from mmtrain.verbs.flops import new_table, print_table


def show_runs(folders: list[Path]) -> int:
    """Books, audit and lineage of one run; of several, or of a folder of runs, a line each and the sum."""
    runs = runs_in(folders)
    return _one(runs[0]) if len(runs) == 1 else _several(runs)


def runs_in(folders: list[Path]) -> list[Path]:
    """The run directories among `folders` and directly below them. Raises UserError where there is none."""
    runs = []
    for folder in folders:
        below = [path.parent for path in sorted(folder.glob(f"*/{LEDGER}"))]
        if (folder / LEDGER).is_file() or (folder / JOURNAL).is_file():
            runs.append(folder)
        elif below:
            runs += below
        else:
            raise UserError(
                f"{folder / LEDGER} does not exist, nor a run below that folder; give run=FOLDER of a run that has "
                "trained, such as run=runs/quickstart"
            )
    return list(dict.fromkeys(runs))


def _one(folder: Path) -> int:
    account = read_account(folder)
    ledger = account.ledger
    spent = ledger.spent_total or 1
    for kind in BOOKS:
        if ledger[kind]:
            print(f"{kind:<30}{ledger[kind]:>12.4g}  {100 * ledger[kind] / spent:5.1f} %")
    print(f"{'training (sum of train_*)':<30}{ledger.training_total:>12.4g}")
    print(f"{'everything spent':<30}{ledger.spent_total:>12.4g}")
    for line in _lineage(account):
        print(line)
    print("\nwhere it was booked")
    for segment in account.segments:
        lost = f", of it lost {segment.lost:.4g}" if segment.lost else ""
        where = f"segment {segment.number}, steps {segment.first_step} to {segment.last_step}"
        print(f"  {where:<40}{sum(segment.books.values()):>12.4g}{lost}")
    for name, books in (*account.artifacts.items(), *account.commands.items()):
        print(f"  {name:<40}{sum(books.values()):>12.4g}  {', '.join(books)}")
    problems = audit(folder, account)
    sound = "the lines add up to the totals, and agree with ledger.json, checkpoints and metrics"
    print(f"audit: {'; '.join(problems) or sound}")
    for name, meaning in CONVENTIONS.items():
        print(f"  {name}: {meaning}")
    return 1 if problems else 0


def _lineage(account: Account) -> list[str]:
    base = account.base
    if base is None:
        return []
    known = "unknown" if base["training"] is None else f"{base['training']:.4g}"
    total = lineage_total(account)
    lines = [f"{'base model, in no book here':<30}{known:>12}  {base['name']} ({base['source']})"]
    whole = "unknown" if total is None else f"{total:.4g}"
    return [
        *lines,
        f"{'training with all base models':<30}{whole:>12}  Epoch AI's rule: a model includes what it is made of",
    ]


def audit(folder: Path, account: Account) -> list[str]:
    """What does not agree, one sentence each: the lines, ledger.json, the newest checkpoint, the logged total."""
    problems = account.problems()
    if (folder / LEDGER).is_file() and Ledger.read(folder / LEDGER).state() != account.ledger.state():
        problems.append(
            f"{LEDGER} is not what {JOURNAL} adds up to (a run that is training now writes it with each log row)"
        )
    state = _newest_state(folder / "checkpoints")
    if state is not None:
        booked, kept = account.training_until(state["step"]), state["ledger"]
        if any(kept.get(kind, 0) != booked.get(kind, 0) for kind in kept if kind.startswith("train_")):
            problems.append(
                f"the checkpoint of step {state['step']} has other training books than the lines up to that step"
            )
    row = _last_logged(folder / "metrics.jsonl")
    if row and sum(account.training_until(row["step"]).values()) != row["flops_total"]:
        problems.append(
            f"metrics.jsonl says flops_total={row['flops_total']:.6g} at step {row['step']}, the lines another sum"
        )
    return problems


def _newest_state(checkpoints: Path) -> dict[str, Any] | None:
    files = sorted(checkpoints.glob("step-*/state.json"))
    try:
        return json.loads(files[-1].read_text(encoding="utf-8")) if files else None
    except (OSError, ValueError):
        return None


def _last_logged(path: Path) -> dict[str, Any] | None:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("flops_total"):
            rows.append(row)
    return rows[-1] if rows else None


def _several(runs: list[Path]) -> int:
    """A line per run, and their sum: what several runs were made from, tokenizers and shards, counts once."""
    table = new_table(
        "run", "training", "lost", "evaluation, sampling", "preparation", "everything", "with base models"
    )
    artifacts: dict[str, dict[str, int]] = {}
    sums: Counter[str] = Counter()
    for run in runs:
        account = read_account(run)
        ledger = account.ledger
        prepared = sum(sum(books.values()) for books in account.artifacts.values())
        artifacts |= account.artifacts
        other = ledger.spent_total - ledger.training_total - ledger["repeated"] - prepared
        total = lineage_total(account)
        numbers = (ledger.training_total, ledger["repeated"], other, prepared, ledger.spent_total)
        with_base = "unknown" if total is None else f"{total:.4g}"
        table.add_row(os.path.relpath(run), *(f"{n:.4g}" for n in numbers), with_base)
        sums.update(dict(zip(("training", "lost", "other"), numbers, strict=False)))
    shared = sum(sum(books.values()) for books in artifacts.values())
    everything = sums.total() + shared
    numbers = (sums["training"], sums["lost"], sums["other"], shared, everything)
    table.add_row("together", *(f"{n:.4g}" for n in numbers), "", style="bold")
    print_table(table)
    print("\nFLOPs. together: artifacts that runs share are counted once; base models are no part of it.")
    return 0

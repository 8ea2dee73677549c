"""`mmtrain checkpoint ls|verify|prune|diff`: look at the checkpoints of a run, check, remove and compare them."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mmtrain.config import UserError
from mmtrain.train.checkpoint import (
    STATE,
    Checkpoint,
    Piece,
    candidates,
    discard,
    file_fault,
    latest_checkpoint,
    open_checkpoint,
    read_manifest,
    read_range,
    removable,
    step_of,
    tensor_pieces,
)
from mmtrain.verbs.trained import find_run

WIDTH_OF_FILES = 140
CHUNK = 2**22  # elements compared at a time
WORST = 3  # parameters named per kind
LONGEST_VALUE = 60  # characters of a value of the state


def main(argv: list[str]) -> int:
    """ls | verify [NAME ...] | prune keep=N [dry] | diff A B, each with run=FOLDER; see `mmtrain checkpoint --help`."""
    words = [argument for argument in argv if "=" not in argument]
    keep = [argument.partition("=")[2] for argument in argv if argument.startswith("keep=")]
    action, names = (words[0], words[1:]) if words else ("ls", [])
    run, rest = find_run([argument for argument in argv if "=" in argument and not argument.startswith("keep=")])
    if rest:
        raise UserError(f"`mmtrain checkpoint` takes run= (name=, experiment=, root=) and keep=, not {rest[0]}")
    folder = run / "checkpoints"
    if action == "ls" and not names and not keep:
        return _list(folder)
    if action == "verify" and not keep:
        return _verify([_place(folder, name) for name in names] or candidates(folder))
    if action == "prune" and names in ([], ["dry"]):
        return _prune(folder, keep, dry=bool(names))
    if action == "diff" and len(names) == 2 and not keep:
        return _diff(*(open_checkpoint(_place(folder, name)) for name in names))
    raise UserError(f"`mmtrain checkpoint {' '.join(argv)}` means nothing; see `mmtrain checkpoint --help`")


def _place(folder: Path, name: str) -> Path:
    """The checkpoint that a step, the name of its folder, or a path names."""
    named = [path for path in candidates(folder) if name in (path.name, str(step_of(path)))]
    path = named[0] if named else Path(name)
    if not path.is_dir():
        there = ", ".join(found.name for found in candidates(folder)) or "none"
        raise UserError(f"{name} is no checkpoint of {folder.parent} and no folder; there is {there}")
    return path


def _table(*headings: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _print(table: Table) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDTH_OF_FILES  # a pipe has no width; rich would assume 80 columns
    console.print(table)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _list(folder: Path) -> int:
    """One line per checkpoint, newest first; nothing is hashed."""
    table = _table("checkpoint", "step", "written", "size", "ranks", "kept for good", "complete")
    for path in candidates(folder):
        try:
            found = open_checkpoint(path)
        except UserError as error:
            table.add_row(path.name, str(step_of(path)), "", "", "", "", f"no: {error}")
        else:
            written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.manifest["time"]))
            ranks, permanent = len(found.manifest["files"]) - 1, found.manifest["permanent"]
            size = _megabytes(found.num_bytes)
            table.add_row(path.name, str(found.step), written, size, str(ranks), "yes" if permanent else "no", "yes")
    if table.row_count:
        _print(table)
    else:
        print(f"there is no checkpoint in {folder}")
    return 0


def _verify(paths: list[Path]) -> int:
    """Hash every file and look at every piece; name what is bad; exit code 1 if anything is."""
    if not paths:
        raise UserError("there is no checkpoint to verify yet; train first")
    num_bad = 0
    for path in paths:
        faults = []
        try:
            files = read_manifest(path)["files"]
            faults = [fault for name in sorted(files) if (fault := file_fault(path, name, files[name]))]
            if not faults:
                with contextlib.ExitStack() as stack:
                    found = open_checkpoint(path)
                    tensor_pieces(found, stack)
                print(f"{path.name}: sound, {_megabytes(found.num_bytes)}")
        except UserError as error:
            faults = [str(error)]
        num_bad += bool(faults)
        for fault in faults:
            print(f"{path.name}: {fault}")
    return 1 if num_bad else 0


def _prune(folder: Path, keep: list[str], dry: bool) -> int:
    """Remove all but the newest `keep`, those kept for good, those that are damaged, and the newest that is sound."""
    if len(keep) != 1 or not keep[0].isdecimal() or int(keep[0]) < 1:
        raise UserError("say how many of the newest checkpoints stay: `mmtrain checkpoint prune keep=2` (at least 1)")
    good, complaints = latest_checkpoint(folder)
    for complaint in complaints:
        print(f"mmtrain: {complaint}")
    freed = 0
    for path in removable(folder, int(keep[0])):
        if good is None or path == good.path:
            continue
        # The run itself may remove one at the same time.
        with contextlib.suppress(FileNotFoundError, UserError):
            num_bytes = open_checkpoint(path).num_bytes
            if not dry:
                discard(path)
            freed += num_bytes
            print(f"{'would remove' if dry else 'removed'} {path.name}, {_megabytes(num_bytes)}")
    print(f"{_megabytes(freed)} {'would be' if dry else 'were'} freed; {len(candidates(folder))} are there")
    return 0


@dataclass
class Difference:
    """Of one tensor in two checkpoints; relative: to the largest number in either."""

    name: str
    absolute: float
    relative: float


def _diff(left: Checkpoint, right: Checkpoint) -> int:
    """Compare states key by key and tensors bit by bit, however many ranks wrote them; exit code 1 if any differs."""
    print(f"{left.path}\n{right.path}")
    states = _flat(left.state), _flat(right.state)
    differing = sorted({key for key, _ in states[0].items() ^ states[1].items()})
    for key in differing:
        print(f"  {STATE}: {key}: " + " | ".join(state.get(key, "absent")[:LONGEST_VALUE] for state in states))
    with contextlib.ExitStack() as stack:
        here, there = tensor_pieces(left, stack), tensor_pieces(right, stack)
        shapes = left.shapes, right.shapes
        by_kind: dict[str, list[Difference]] = {}
        for key in sorted(here.keys() | there.keys()):
            kind, _, name = key.partition(".")
            found = by_kind.setdefault(kind, [])
            if key not in here or key not in there or shapes[0][name] != shapes[1][name]:
                print(f"  {key}: {_shape(left, here, key)} | {_shape(right, there, key)}")
                found.append(Difference(name, math.inf, math.inf))
            else:
                found.append(_compare(key, name, here[key], there[key]))
    table = _table("kind", "tensors", "differ", "largest difference", "relative to the largest number", "worst")
    for kind, found in by_kind.items():
        bad = sorted((d for d in found if d.absolute), key=lambda d: d.absolute, reverse=True)
        absolute, relative = (max((getattr(d, key) for d in bad), default=0.0) for key in ("absolute", "relative"))
        worst = ", ".join(f"{d.name} {d.absolute:.2e}" for d in bad[:WORST])
        table.add_row(kind, str(len(found)), str(len(bad)), f"{absolute:.3e}", f"{relative:.3e}", worst)
    _print(table)
    is_equal = not any(d.absolute for found in by_kind.values() for d in found)
    print(f"tensors: {'equal bit for bit' if is_equal else 'not equal'}; state: {'not ' if differing else ''}equal")
    return 0 if is_equal and not differing else 1


def _shape(checkpoint: Checkpoint, pieces: dict[str, list[Piece]], key: str) -> str:
    return str(checkpoint.shapes[key.partition(".")[2]]) if key in pieces else "absent"


def _flat(value: Any, key: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} -> {"a.b": "1"}."""
    if isinstance(value, dict) and value:
        parts = (_flat(inner, f"{key}.{name}" if key else name) for name, inner in value.items())
        return {name: text for part in parts for name, text in part.items()}
    return {key: repr(value)}


def _compare(key: str, name: str, left: list[Piece], right: list[Piece]) -> Difference:
    """In chunks, so that a tensor need not fit in memory. Bits that are equal are no difference, a NaN an infinite."""
    absolute = largest = 0.0
    for a, b in zip(_chunks(key, left), _chunks(key, right), strict=True):
        if not torch.equal(a.view(torch.int32), b.view(torch.int32)):
            distance = (a - b).abs().where(a.view(torch.int32) != b.view(torch.int32), 0.0)
            # -0.0 and 0.0 have other bits and no distance.
            distance = distance.nan_to_num(nan=math.inf, posinf=math.inf).max().item() or math.ulp(0.0)
            absolute = max(absolute, distance)
        largest = max(largest, *(x.abs().nan_to_num(nan=0.0, posinf=0.0).max().item() for x in (a, b)))
    return Difference(name, absolute, absolute / largest if largest else absolute)


def _chunks(key: str, pieces: list[Piece]) -> Iterator[torch.Tensor]:
    size = sum(piece.length for piece in pieces)
    for start in range(0, size, CHUNK):
        chunk = torch.empty(min(CHUNK, size - start))
        read_range(pieces, key, start, chunk)
        yield chunk

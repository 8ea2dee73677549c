"""metrics.jsonl: one JSON object per line, only ever appended to; the truth about a run.

A crash can leave a cut last line, and a resumed run logs some steps a second time. The writer never touches
what is there; the reader sorts it out.
"""

import json
import math
import mmap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

Row = dict[str, Any]

TAIL_BYTES = 1 << 14


class MetricsWriter:
    """Appends rows to a file and flushes each. Raises OSError as the file system does."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115 - lives as long as the run
        if self._file.tell() > 0:
            with open(path, "rb") as reader:
                reader.seek(-1, 2)
                if reader.read(1) != b"\n":  # the dead segment was cut within a line
                    self._file.write(b"\n")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row and the time of writing (Unix seconds).

        NaN and infinities, which JSON does not know, become null, and "non_finite" names them.
        """
        plain = plain_row(row)
        plain.setdefault("time", round(time.time(), 3))
        self._file.write(json.dumps(plain, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; writing again is an error."""
        self._file.close()


def plain_row(row: Mapping[str, Any]) -> Row:
    """`row` with scalars of numpy and torch as Python numbers, and non-finite ones as null with a note."""
    plain: Row = {}
    non_finite = {}
    for key, value in row.items():
        if hasattr(value, "item"):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            non_finite[key], value = str(value), None
        plain[key] = value
    if non_finite:
        plain["non_finite"] = non_finite
    return plain


def read_metrics(path: Path) -> list[Row]:
    """Rows by rising step, one per step, as the surviving training wrote them; [] when there is no file.

    A step smaller than the one before it starts a new segment (the run was resumed from a checkpoint): rows of
    the dead segment from that step on are dropped, whether or not they were logged again. Rows of one step are
    merged, the later value winning.
    """
    if not path.exists():
        return []
    rows: dict[int, Row] = {}
    last = -1
    with open(path, "rb") as file:
        for row in read_rows(file):
            step = row["step"]
            if step < last:
                rows = {earlier: kept for earlier, kept in rows.items() if earlier < step}
            rows[step] = {**rows.get(step, {}), **row}
            last = step
    return list(rows.values())


def read_rows(file: BinaryIO) -> Iterator[Row]:
    """All rows from the file's position on, as they were written; the next call goes on where this one ended.

    Lines that are no JSON object with a step (cut by a crash) are left out; a last line that is still being written is
    for the next call.
    """
    for line in iter(file.readline, b""):
        row = parse_row(line)
        if row is not None:
            yield row
        elif not line.endswith(b"\n"):
            file.seek(-len(line), 1)
            return


def parse_row(line: bytes) -> Row | None:
    """The row in a line; None for what is no JSON object with a step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def last_rows(path: Path, needed: str = "", num_bytes: int = TAIL_BYTES) -> list[Row]:
    """Rows in the last bytes of the file (more where no row ends in them), as they were written.

    needed: a key whose last row comes first in the list when it lies farther back. [] where nothing can be read.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = max(0, len(content) - num_bytes)
            # What comes before the first line end is the rest of a line.
            lines = content[content.find(b"\n", start) + 1 if start else 0 :].split(b"\n")
            rows = [row for line in lines if (row := parse_row(line)) is not None]
            if needed and not any(needed in row for row in rows):
                key = content.rfind(b'"%s":' % needed.encode())
                line_end = content.find(b"\n", key)
                if (
                    key >= 0
                    and line_end >= 0
                    and (row := parse_row(content[content.rfind(b"\n", 0, key) + 1 : line_end]))
                ):
                    rows.insert(0, row)
    except (OSError, ValueError):  # there is none, or it is empty
        return []
    return rows or (last_rows(path, needed, 16 * num_bytes) if start else [])

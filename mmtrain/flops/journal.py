"""RUN/ledger.jsonl: what was booked when, one line each, only ever appended to; ledger.json is derived from it.

    {"start": 40, "segment": 2}                            training begins, or goes on, after step 40
    {"steps": [40, 50], "segment": 2, "books": {...}}      booked at step 50, since step 40
    {"artifact": "tokens-1f2e", "books": {...}}            what preparing the data cost, once per artifact
    {"by": "evaluate", "books": {...}}                     a command that looked at the run
    {"base": {"name": ..., "training": ...}}               the model whose weights it started from; in no book

A start after step 40 makes every later step that was booked before it lost: spent, but no progress.
"""

import contextlib
import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mmtrain.config import UserError
from mmtrain.flops.ledger import BOOKS, TRAIN_BOOKS, Ledger

JOURNAL, LEDGER = "ledger.jsonl", "ledger.json"
Books = dict[str, int]


@dataclass
class Segment:
    """Training from one start to the next. lost: of `books`, the training that was done again later."""

    number: int
    first_step: int
    last_step: int
    books: Books = field(default_factory=dict)
    lost: int = 0

    @property
    def training(self) -> int:
        """FLOPs of training in this segment, lost or not."""
        return sum(self.books.get(kind, 0) for kind in TRAIN_BOOKS)


@dataclass
class Account:
    """What a journal adds up to."""

    ledger: Ledger = field(default_factory=Ledger)
    segments: list[Segment] = field(default_factory=list)
    artifacts: dict[str, Books] = field(default_factory=dict)
    commands: dict[str, Books] = field(default_factory=dict)
    base: dict[str, Any] | None = None
    surviving: list[tuple[int, int, Books]] = field(default_factory=list)
    """Steps from, to, and their books, of the training that was not lost."""

    def training_until(self, step: int) -> Books:
        """Training books of the surviving steps up to `step`."""
        total: Counter[str] = Counter()
        for _, last, books in self.surviving:
            if last <= step:
                total.update({kind: books.get(kind, 0) for kind in TRAIN_BOOKS})
        return dict(total)

    def problems(self) -> list[str]:
        """What is wrong with the books themselves, one sentence each."""
        found, reached = [], 0
        for first, last, _ in self.surviving:
            if first != reached:
                what = "are booked twice" if first < reached else "are not booked"
                found.append(f"steps {min(first, reached)} to {max(first, reached)} {what}")
            reached = last
        parts: Counter[str] = Counter()
        for books in (*(s.books for s in self.segments), *self.artifacts.values(), *self.commands.values()):
            parts.update(books)
        lost = sum(segment.lost for segment in self.segments)
        if sum(parts.values()) != self.ledger.spent_total or lost > self.ledger["repeated"]:
            found.append("the segments, the artifacts and the commands do not add up to the totals")
        return found


def replay(entries: Sequence[Mapping[str, Any]]) -> Account:
    """Add up a journal. Raises UserError when a line has a book or an amount that cannot be."""
    account, total = Account(), Counter[str]()
    live: list[tuple[int, int, Books, Segment]] = []
    for entry in entries:
        books = _checked(entry.get("books", {}))
        if "start" in entry:
            account.segments.append(Segment(entry["segment"], entry["start"], entry["start"]))
            for _, last, lost_books, segment in live:
                if last > entry["start"]:
                    lost = sum(lost_books.get(kind, 0) for kind in TRAIN_BOOKS)
                    segment.lost += lost
                    total["repeated"] += lost
                    total.subtract({kind: lost_books.get(kind, 0) for kind in TRAIN_BOOKS})
            live = [each for each in live if each[1] <= entry["start"]]
        elif "steps" in entry:
            first, last = entry["steps"]
            if not account.segments or account.segments[-1].number != entry["segment"]:
                account.segments.append(Segment(entry["segment"], first, last))
            segment = account.segments[-1]
            segment.last_step = max(segment.last_step, last)
            segment.books = _sum(segment.books, books)
            live.append((first, last, books, segment))
        elif "base" in entry:
            account.base = entry["base"]
        else:
            group = account.artifacts if "artifact" in entry else account.commands
            name = str(entry.get("artifact") or entry.get("by"))
            group[name] = _sum(group.get(name, {}), books)
        total.update(books)
    account.surviving = [(first, last, books) for first, last, books, _ in live]
    account.ledger.load({kind: total[kind] for kind in BOOKS})
    return account


def _checked(books: Any) -> Books:
    if not isinstance(books, dict) or any(k not in BOOKS or type(n) is not int or n < 0 for k, n in books.items()):
        raise UserError(f"the compute journal has a line that books {str(books)[:80]}; it was not written by mmtrain")
    return books


def _sum(one: Books, other: Books) -> Books:
    return {kind: one.get(kind, 0) + other.get(kind, 0) for kind in (*one, *(k for k in other if k not in one))}


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """Lines of the journal of a run; a run of an older mmtrain has one, what its ledger.json says; else none.

    A last line that a kill has cut is left out. Raises UserError that names any other damaged line.
    """
    path = folder / JOURNAL
    return _parse(path.read_bytes(), path) if path.is_file() else _before_journal(folder)


def read_account(folder: Path) -> Account:
    """What was spent on the run in `folder`. Raises UserError when it has no journal and no ledger.json."""
    entries = read_journal(folder)
    if not entries and not (folder / JOURNAL).is_file():
        raise UserError(
            f"{folder / LEDGER} does not exist; give run=FOLDER of a run that has trained, such as run=runs/quickstart"
        )
    return replay(entries)


def _parse(content: bytes, path: Path) -> list[dict[str, Any]]:
    whole = content[: content.rfind(b"\n") + 1]
    entries = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise UserError(f"{path} line {number} is damaged ({error}); bring the file back from a copy") from error
        entries.append(entry)
    return entries


def _before_journal(folder: Path) -> list[dict[str, Any]]:
    """The line that carries over ledger.json of a run from before there was a journal; none without that file."""
    path = folder / LEDGER
    return _carried(Ledger.read(path).state(), 0) if path.is_file() else []


def _carried(books: Books, step: int) -> list[dict[str, Any]]:
    """One line for all that was booked before there was a journal."""
    return [{"steps": [0, step], "segment": 0, "books": {kind: n for kind, n in books.items() if n}}]


class Journal:
    """Writes the journal of one run. Several processes may: a training run and `mmtrain evaluate` beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / JOURNAL
        self._written = Ledger()  # what the journal says, as far as this process has read and written it
        self._step = self._segment = self._size = 0

    def start(
        self, ledger: Ledger, step: int, artifacts: Mapping[str, Books], base: dict[str, Any] | None = None
    ) -> int:
        """Begin, or go on, after `step`; `ledger`, as its checkpoint has it, becomes what the journal says then.

        artifacts: what the run was made from and what that cost, by name; each is booked once. base: facts about the
        model it started from. Returns the FLOPs of training that are lost by this start.
        """
        with self._open() as file:
            entries = _parse(file.read(), self.path)
            new: list[dict[str, Any]] = []
            if not entries:
                ledger.recover(self.folder / LEDGER)  # of an older mmtrain
                if ledger.spent_total:
                    new = _carried(ledger.state(), step)
                    new += [{"artifact": name, "books": {}} for name in artifacts]
            before = replay([*entries, *new])
            segment = 1 + max((s.number for s in before.segments), default=0)
            new.append({"start": step, "segment": segment})
            new += [
                {"artifact": name, "books": books} for name, books in artifacts.items() if name not in before.artifacts
            ]
            if base and not before.base:
                new.append({"base": base})
            account = replay([*entries, *new])
            missing = {kind: ledger[kind] - account.ledger[kind] for kind in TRAIN_BOOKS}
            if any(n > 0 for n in missing.values()):  # lines that a power cut took; the checkpoint knows better
                reached = account.surviving[-1][1] if account.surviving else 0
                books = {kind: n for kind, n in missing.items() if n > 0}
                new.append({"steps": [reached, step], "segment": segment, "books": books})
                account = replay([*entries, *new])
            self._append(file, new)
        ledger.load(account.ledger.state())
        self._written.load(ledger.state())
        self._step, self._segment = step, segment
        self._export(ledger)
        return account.ledger["repeated"] - before.ledger["repeated"]

    def write(self, ledger: Ledger, step: int) -> None:
        """Append what `ledger` has beyond the journal, as booked at `step`; takes over what others have appended."""
        now, known = ledger.state(), self._written.state()
        books = {kind: now[kind] - known[kind] for kind in BOOKS if now[kind] != known[kind]}
        if not books:
            return
        with self._open() as file:
            file.seek(self._size)
            others = replay(_parse(file.read(), self.path)).ledger.state()
            self._append(file, [{"steps": [self._step, step], "segment": self._segment, "books": books}])
        for kind, flops in others.items():
            ledger.book(kind, flops)
        self._written.load(ledger.state())
        self._step = step
        self._export(ledger)

    def book(self, kind: str, flops: int, by: str) -> None:
        """Book the work of a command that looks at the run."""
        with self._open() as file:
            entries = _parse(file.read(), self.path)
            new = [] if entries else _before_journal(self.folder)
            new.append({"by": by, "books": {kind: flops}})
            ledger = replay([*entries, *new]).ledger
            self._append(file, new)
        self._export(ledger)

    @contextlib.contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        """The file at its beginning, locked where the file system can, without a line that a kill has cut."""
        with open(self.path, "a+b") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.seek(0)
            yield file

    def _append(self, file: BinaryIO, entries: Sequence[dict[str, Any]]) -> None:
        file.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())
        file.flush()
        self._size = file.seek(0, os.SEEK_END)

    def _export(self, ledger: Ledger) -> None:
        """Write ledger.json; no wait for the disk, since the journal can make it again."""
        temporary = self.folder / f".{LEDGER}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(ledger.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / LEDGER)

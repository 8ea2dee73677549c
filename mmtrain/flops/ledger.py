"""The ledger: every FLOP that a run spends, in books by kind, exact and persistent.

What the model learned from (train_*) is progress. What was spent otherwise is kept apart: tokenizers,
retrieval, evaluation, sampling, and steps that a crash threw away and that are trained again (repeated).
"""

import json
import operator
from pathlib import Path
from typing import Any

from mmtrain.config import UserError, write_text_atomic
from mmtrain.flops.count import TOKEN_KINDS

FORMAT_VERSION = 1
TRAIN_BOOKS = tuple(f"train_{kind}" for kind in TOKEN_KINDS)
BOOKS = (
    *TRAIN_BOOKS,
    "image_tokenizer_train",
    "image_tokenizer_encode",
    "retrieval_train",
    "retrieval_encode",
    "evaluation",
    "sampling",
    "repeated",
)
CONVENTIONS = {
    "flop": "1 multiply-add = 2 FLOPs",
    "train": "model FLOPs, 3 x forward; causal and document-masked attention (sum of squared document lengths / 2); "
    "padding and recomputation excluded",
    "shares": "a step's FLOPs are shared among text, image, retrieved and special tokens in proportion to their number",
    "repeated": "training steps lost in a crash and trained again: spent, but not progress",
    "training_total": "sum of train_*: the figure to compare with published training compute",
    "spent_total": "everything in this ledger",
}


class Ledger:
    """Books of FLOPs by kind (`BOOKS`); integers only."""

    def __init__(self) -> None:
        self._books = dict.fromkeys(BOOKS, 0)

    def __getitem__(self, kind: str) -> int:
        return self._books[kind]

    def book(self, kind: str, flops: int) -> None:
        """Add `flops` to the book `kind`.

        Raises ValueError for an unknown kind or a negative amount, TypeError for anything but an integer.
        """
        if kind not in self._books:
            raise ValueError(f"the ledger has no book {kind!r}; its books: {', '.join(BOOKS)}")
        amount = operator.index(flops)
        if amount < 0:
            raise ValueError(f"a ledger only grows; got {amount} for {kind!r}")
        self._books[kind] += amount

    def book_training(self, parts: dict[str, int]) -> None:
        """Book one training step, shared out by kind of token (`split_by_kind`)."""
        for kind, flops in parts.items():
            self.book(f"train_{kind}", flops)

    @property
    def training_total(self) -> int:
        """FLOPs of training that the model at hand has learned from."""
        return sum(self._books[kind] for kind in TRAIN_BOOKS)

    @property
    def spent_total(self) -> int:
        """All FLOPs, repeated work and side work included."""
        return sum(self._books.values())

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: JSON-able, one integer per book."""
        return dict(self._books)

    def load(self, state: dict[str, int]) -> None:
        """Continue from `state()` of a checkpoint. Books that it does not know start at 0."""
        books = dict.fromkeys(BOOKS, 0)
        for kind, flops in state.items():
            if kind not in books or type(flops) is not int or flops < 0:
                raise UserError(f"The compute ledger has an invalid book {kind!r}: {flops!r}; use an older checkpoint.")
            books[kind] = flops
        self._books = books

    def repeat(self, spent: dict[str, int]) -> int:
        """After `load` of an older state: what `spent` (a `state()`) counts beyond it was really computed.

        Training beyond it will be done again, so it is booked as `repeated`; other work keeps its book. Returns the
        FLOPs booked as repeated by this call.
        """
        lost = sum(max(0, spent.get(kind, 0) - self._books[kind]) for kind in TRAIN_BOOKS)
        for kind in BOOKS:
            if kind not in TRAIN_BOOKS:
                self._books[kind] = max(self._books[kind], spent.get(kind, 0))
        self._books["repeated"] += lost
        return lost

    def recover(self, path: Path) -> int:
        """After `load`, take over what the ledger.json of a crashed run counts beyond its last checkpoint.

        As `repeat`. Does nothing when there is no file. Raises UserError when the file is damaged.
        """
        if not path.exists():
            return 0
        return self.repeat(Ledger.read(path).state())

    def to_dict(self) -> dict[str, Any]:
        """Contents of ledger.json: conventions, FLOPs by kind and totals."""
        return {
            "format_version": FORMAT_VERSION,
            "conventions": CONVENTIONS,
            "flops": self.state(),
            "training_total": self.training_total,
            "spent_total": self.spent_total,
        }

    def save(self, path: Path) -> None:
        """Write ledger.json, atomically."""
        write_text_atomic(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Ledger":
        """The ledger saved at `path`. Raises UserError when it is missing, damaged or of another version."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version, flops = content["format_version"], dict(content["flops"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a readable compute ledger ({error}); move it away to start a new one."
            ) from error
        if version != FORMAT_VERSION:
            raise UserError(f"{path} has ledger format {version}; this version of mmtrain reads {FORMAT_VERSION}.")
        ledger = cls()
        ledger.load(flops)
        return ledger

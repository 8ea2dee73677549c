"""One pass over a corpus, with an account of what was left out."""

from collections import Counter
from collections.abc import Callable, Iterator

from mmtrain.documents.document import Document


def printable(name: str) -> str:
    """A file name that UTF-8 can hold: Linux allows names that are not text."""
    return name.encode("utf-8", "replace").decode()


class Reading:
    """Iterable over documents that counts what it skips.

    skipped: reason -> how many; examples: reason -> first file name with it. Both are those of the newest
    pass, complete when it has ended. `produce` is a generator function that calls `skip` on the reading.
    """

    def __init__(self, produce: Callable[["Reading"], Iterator[Document]]) -> None:
        self._produce = produce
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def __iter__(self) -> Iterator[Document]:
        self.skipped.clear()
        self.examples.clear()
        return self._produce(self)

    def skip(self, reason: str, name: str, count: int = 1) -> None:
        """Count something left out; `name` says which (a path relative to the corpus)."""
        self.skipped[reason] += count
        self.examples.setdefault(reason, printable(name))

    def summary(self) -> str:
        """One clause for people: "3 x empty caption (first: a/b.png), ..."; empty when nothing was skipped."""
        return ", ".join(
            f"{count} x {reason} (first: {self.examples[reason]})" for reason, count in self.skipped.most_common()
        )

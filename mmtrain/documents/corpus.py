"""What a reader is: a class that lists the partitions of a corpus and reads the documents of each.

A partition is the unit of work: read again after a crash, given to any process, always with the same result.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmtrain.config import CorpusConfig, UserError
from mmtrain.documents.document import Document

Partition = dict[str, Any]
"""Plain JSON values that say what to read, such as {"tar": "00012.tar"}: it is stored and sent to processes."""


def printable(name: str) -> str:
    """A file name that UTF-8 can hold: Linux allows names that are not text."""
    return name.encode("utf-8", "replace").decode()


class Account:
    """What a reader left out, and why. Reasons are a few fixed phrases to count by.

    skipped: reason -> how many, left out by a rule (nothing was wrong). bad: the same of damage. examples: reason ->
    the first name. Nothing that a corpus holds may be in neither of these and in no document.
    """

    def __init__(self, on_bad: str = "skip") -> None:
        self._on_bad = on_bad
        self.skipped: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def skip(self, reason: str, name: str, count: int = 1) -> None:
        """Count something left out by a rule; `name` says which (a path relative to the corpus)."""
        self.skipped[reason] += count
        self.examples.setdefault(reason, printable(name))

    def spoil(self, reason: str, name: str, count: int = 1) -> None:
        """Count something damaged. Raises UserError when corpus.on_bad=fail."""
        if self._on_bad == "fail":
            raise UserError(f"{printable(name)}: {reason}; mend it, remove it, or set corpus.on_bad=skip")
        self.bad[reason] += count
        self.examples.setdefault(reason, printable(name))

    def add(self, other: "Account | Mapping[str, Any]") -> None:
        """Count what another account, or its plain form, holds."""
        facts = other.plain() if isinstance(other, Account) else other
        self.skipped.update(facts["skipped"])
        self.bad.update(facts["bad"])
        self.examples = {**facts["examples"], **self.examples}

    def plain(self) -> dict[str, Any]:
        """JSON-able values that `add` takes."""
        return {"skipped": dict(self.skipped), "bad": dict(self.bad), "examples": self.examples}

    def summary(self) -> str:
        """One clause for people: "3 x empty caption (first: a/b.png), ..."; empty when nothing was left out."""
        counts = (self.bad + self.skipped).most_common()
        return ", ".join(f"{count} x {reason} (first: {self.examples[reason]})" for reason, count in counts)


class Corpus:
    """Base of the readers. Cheap to make in every process: it opens nothing until it is asked.

    config: where the corpus is. cache: a folder that keeps downloads.
    """

    def __init__(self, config: CorpusConfig, cache: Path) -> None:
        self.config = config
        self.cache = cache

    def partitions(self, account: Account) -> list[Partition]:
        """Everything there is to read, in an order that depends on the corpus alone.

        What is left out by name already goes to `account`. A partition should take a second to a minute to read:
        a file of thousands of documents, or some hundred small files. Raises UserError for what the user can mend
        (no path, an empty folder): one sentence.
        """
        raise NotImplementedError

    def documents(self, partition: Partition, account: Account) -> Iterator[Document]:
        """The documents of one partition in order, a pure function of the partition's files.

        One document in memory at a time. Ids are unique in the corpus. A document whose side the corpus itself
        decides has meta["split"], "train" or "validation"; of all others the side is decided by content later.
        """
        raise NotImplementedError


def judge(account: Account, num_documents: int, config: CorpusConfig) -> None:
    """Raise UserError when the corpus gave no document, or more than config.max_bad_fraction of it is bad.

    account: that of all partitions. Called once, when everything has been read.
    """
    where = f"corpus {config.name} ({config.path})" if config.path else f"corpus {config.name}"
    if num_documents == 0:
        raise UserError(f"{where} has no usable document: {account.summary() or 'nothing was found'}.")
    num_bad = account.bad.total()
    num_seen = num_bad + num_documents
    if num_bad > config.max_bad_fraction * num_seen:
        raise UserError(
            f"{where}: {num_bad} of {num_seen} entries cannot be used, more than "
            f"corpus.max_bad_fraction={config.max_bad_fraction} allows: {account.summary()}; mend or remove "
            "them, or raise that limit."
        )

"""`mmtrain data inspect`: single documents in the terminal, as they are stored and as tokens."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from mmtrain.config import Config, UserError
from mmtrain.config.suggest import did_you_mean, nearest
from mmtrain.documents import Document
from mmtrain.shards import DocumentShards, TokenShards
from mmtrain.tokens import TextTokenizer, tokens_to_segments
from mmtrain.track.page import UNSAFE
from mmtrain.track.statistics import cluster_of
from mmtrain.verbs.prepared import open_corpus

FIRST_DOCUMENTS = 3
MOST_CHARACTERS = 1000
MOST_IDS = 48
NEAR_IDS = 5000  # ids looked at, before and after the place of an unknown one, for near ones

Place = tuple[str, int]  # split and index in it


def main(config: Config, words: list[str]) -> int:
    """Print the documents that the words name (ids, indices, SPLIT:INDEX), or the first few; `full` cuts nothing."""
    corpus = open_corpus(config)
    names = [word for word in words if word != "full"]
    documents = corpus.documents
    places = [find(documents, name) for name in names] or first_places(documents, FIRST_DOCUMENTS)
    console = Console(highlight=False)
    for split, i in places:
        console.print()
        show(split, i, documents[split], corpus.tokens.get(split), corpus.text, console, full="full" in words)
    return 0


def first_places(documents: Mapping[str, DocumentShards], limit: int) -> list[Place]:
    """The first documents of the first split."""
    split, shards = next(iter(documents.items()))
    return [(split, i) for i in range(min(limit, len(shards)))]


def find(documents: Mapping[str, DocumentShards], name: str) -> Place:
    """Where the document is that `name` means: its id, SPLIT:INDEX, or an index that runs on through the splits.

    Raises UserError with ids that resemble `name`, or with the range of the indices.
    """
    for split, shards in documents.items():
        try:
            return split, shards.index_of(name)
        except KeyError:
            continue
    prefix, _, number = name.rpartition(":")
    if number.isascii() and number.isdigit() and (not prefix or prefix in documents):
        return at({prefix: documents[prefix]} if prefix else documents, int(number))
    near = nearest(name, [id for shards in documents.values() for id in _ids_around(shards, name)], cutoff=0.5)
    hint = did_you_mean(near) if near else "give an id, an index, or SPLIT:INDEX such as validation:0"
    raise UserError(f"the corpus has no document {UNSAFE.sub('?', name)}; {hint}")


def at(documents: Mapping[str, DocumentShards], index: int) -> Place:
    """Where document `index` is, counted from 0 through all of `documents`. Raises UserError beyond the last."""
    rest = index
    for split, shards in documents.items():
        if rest < len(shards):
            return split, rest
        rest -= len(shards)
    total = sum(map(len, documents.values()))
    names = " and ".join(documents)
    raise UserError(f"there is no document {index:,} of {names}: give a number from 0 to {total - 1:,}, or an id")


def _ids_around(shards: DocumentShards, name: str) -> list[str]:
    """Ids that begin like `name`: comparing with all ids of a large corpus would take minutes."""
    ids = np.sort(shards.ids)
    place = int(np.searchsorted(ids, name.encode("utf-8", "replace")))
    return [id.decode() for id in ids[max(0, place - NEAR_IDS) : place + NEAR_IDS]]


def show(
    split: str,
    i: int,
    documents: DocumentShards,
    tokens: TokenShards | None,
    text: TextTokenizer,
    console: Console,
    full: bool = False,
) -> None:
    """Print document i of a split: what it says, where it lies, what its tokens are.

    full: whole texts and all ids; else their beginnings, and how much is left.
    """
    document = documents[i]
    console.rule(Text(document.id, style="bold"), align="left")
    facts = {"source": document.source, "split": f"{split}, document {i:,} of {len(documents):,}"}
    if (cluster := cluster_of(document.meta)) is not None:
        facts["cluster"] = cluster
    facts["meta"] = _cut(json.dumps(document.meta, ensure_ascii=False), full)
    for label, value in facts.items():
        console.print(_line(f"{label:<10}", value))
    console.print(_place("stored", document.id, *documents.place(i)), soft_wrap=True)
    show_segments(document, console, full)
    if tokens is not None:
        show_tokens(document, tokens, text, console, full)


def show_segments(document: Document, console: Console, full: bool) -> None:
    """Texts wrapped to the terminal, pictures in one line each, in reading order."""
    for number, segment in enumerate(document.segments):
        if isinstance(segment, str):
            console.print(_line(f"\n{number:>3} text     ", f"{len(segment):,} characters"))
            console.print(Text(printable(_cut(segment, full))))
        else:
            what = f"{segment.width} x {segment.height} {segment.extension}, {len(segment.data):,} bytes"
            console.print(_line(f"\n{number:>3} picture  ", f"{what}, sha256 {segment.sha256}"))


def show_tokens(document: Document, shards: TokenShards, text: TextTokenizer, console: Console, full: bool) -> None:
    """The segments of the token document with the same id, their ids, and the texts that they decode to."""
    try:
        i = shards.index_of(document.id)
    except KeyError:
        console.print(_line("\ntokens    ", f"none: {shards.store.location} does not hold this document"))
        return
    ids = shards.tokens(i)
    console.print(_line("\ntokens    ", f"{len(ids):,} in {len(shards.segments(i))} segments"))
    console.print(_place("stored", document.id, *shards.place(i)), soft_wrap=True)
    for number, segment in enumerate(shards.segments(i)):
        part = ids[segment.start : segment.start + segment.length]
        where = f"start {segment.start:,}, length {segment.length:,}"
        console.print(_line(f"{number:>3} {segment.kind:<7}", f"{where}, ids {_listed(part.tolist(), full, 8)}"))
    names = [id_name(id, shards) for id in ids.tolist()]
    console.print(_line("ids       ", _listed(names, full, MOST_IDS)))
    for kind, local in tokens_to_segments(ids, shards.vocabulary):
        if kind == "text":
            decoded = text.decode(local.tolist())
            same = "as stored" if decoded in document.texts else "NOT a text of the document"
            console.print(_line("decoded   ", f"{_cut(decoded, full)} ({same})"))


def id_name(id: int, shards: TokenShards) -> str:
    """A special id by its name, any other as a number."""
    vocabulary = shards.vocabulary
    specials: dict[int, str] = {number: name for name, number in vocabulary.describe()["specials"].items()}
    if vocabulary.sentinel_start <= id < vocabulary.sentinel_end:
        return f"<sentinel:{id - vocabulary.sentinel_start}>"
    return specials.get(id, str(id))


def printable(text: str) -> str:
    """`text` without what a terminal would obey: escape sequences and reordering marks become U+FFFD."""
    return UNSAFE.sub("\ufffd", text)


def _line(label: str, value: str) -> Text:
    return Text.assemble((label, "dim"), printable(value))


def _cut(text: str, full: bool) -> str:
    left = len(text) - MOST_CHARACTERS
    return text if full or left <= 0 else f"{text[:MOST_CHARACTERS]}… ({left:,} more characters; `full` shows all)"


def _listed(items: Sequence[Any], full: bool, limit: int) -> str:
    left = len(items) - limit
    shown = " ".join(map(str, items if full else items[:limit]))
    return shown if full or left <= 0 else f"{shown} … ({left:,} more)"


def _place(label: str, key: str, path: str, offset: int, size: int) -> Text:
    command = f"tar -xOf {os.path.relpath(path)} {key}.json"
    return _line(f"{label:<10}", f"{command}   # {size:,} bytes from byte {offset:,}")

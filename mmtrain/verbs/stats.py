"""`mmtrain data stats`: what is in a corpus, as tables for people or as JSON."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmtrain.config import Config, UserError
from mmtrain.track.page import clean
from mmtrain.track.statistics import corpus_statistics
from mmtrain.verbs.prepared import open_corpus
from mmtrain.verbs.progress import Bar

BAR = "█"
BAR_WIDTH = 40


def main(config: Config, words: list[str]) -> int:
    """Print the statistics of the corpus; with the word `json`, JSON and nothing else on standard output."""
    if words not in ([], ["json"]):
        raise UserError(f"`mmtrain data stats` takes the word json or none, not {' '.join(words)!r}")
    with redirect_stdout(sys.stderr if words else sys.stdout):
        corpus = open_corpus(config)
        with Bar("reading documents", sum(map(len, corpus.documents.values()))) as advance:
            found = corpus_statistics(
                corpus.documents, corpus.tokens, corpus.facts, config.stream.sequence_length, advance
            )
    if words:
        print(json.dumps({"corpus": ", ".join(config.sources), **found}, indent=1))
    else:
        show(found, f"corpus {', '.join(config.sources)}", Console(highlight=False))
    return 0


def show(found: Mapping[str, Any], title: str, console: Console) -> None:
    """Print the values of `corpus_statistics`."""
    splits = found["splits"]
    table = Table(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for split in splits:
        table.add_column(split, justify="right")
    for label, cells in rows(list(splits.values())):
        table.add_row(Text(label, style="dim"), *map(Text, cells))
    console.print(table)
    for split, values in splits.items():
        if "tokens" in values:
            console.print(Text(f"\ntokens per document, {split}", style="bold"))
            console.print(Text("\n".join(histogram_lines(values["tokens"]["histogram"]))))
    console.print()
    for line in remarks(found):
        console.print(Text(line), soft_wrap=True)


def rows(splits: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Label, and one cell per split."""
    found = [
        ("documents", [f"{s['documents']:,}" for s in splits]),
        *((f"  {kind}", [_part(s["kinds"][kind], s["documents"]) for s in splits]) for kind in splits[0]["kinds"]),
        ("texts", [f"{s['texts']:,}" for s in splits]),
        ("characters", [f"{s['characters']:,}" for s in splits]),
        ("pictures", [f"{s['pictures']:,}" for s in splits]),
        ("  formats", [", ".join(f"{n:,} {name}" for name, n in s["picture_formats"].items()) or "–" for s in splits]),
        ("  per document: mean, median, most", [_spread(s["pictures_per_document"]) for s in splits]),
        ("  longer side: smallest, median, largest", [_sides(s["longer_side"]) for s in splits]),
        ("  shorter side: smallest, median, largest", [_sides(s["shorter_side"]) for s in splits]),
        ("document shards", [f"{s['shards']:,}, {size(s['shard_bytes'])}" for s in splits]),
    ]
    if not all("tokens" in s for s in splits):
        return found
    tokens = [s["tokens"] for s in splits]
    lengths = [t["length"] for t in tokens]
    return [
        *found,
        ("token shards", [f"{t['shards']:,}, {size(t['shard_bytes'])}" for t in tokens]),
        ("tokens", [f"{t['total']:,}" for t in tokens]),
        *((f"  {kind}", [_part(t[kind], t["total"]) for t in tokens]) for kind in ("text", "image", "special")),
        ("  per document: mean", [f"{length['mean']:,.1f}" for length in lengths]),
        *((f"    {p}", [f"{length[p]:,}" for length in lengths]) for p in lengths[0] if p != "mean"),
        (
            f"fit in a sequence of {tokens[0]['sequence_length']:,}",
            [_part(t["fit"], s["documents"]) for s, t in zip(splits, tokens, strict=True)],
        ),
        ("  windows for all, at least", [f"{t['windows']:,}" for t in tokens]),
        ("text tokens per character", [_rate(s["fertility"], "per_character") for s in splits]),
        ("text tokens per byte", [_rate(s["fertility"], "per_byte") for s in splits]),
        ("image codes used", [_part(t["codes"]["used"], t["codes"]["size"]) if t["codes"] else "–" for t in tokens]),
        ("  perplexity", [f"{t['codes']['perplexity']:,.0f}" if t["codes"] else "–" for t in tokens]),
    ]


def histogram_lines(bins: Sequence[Sequence[int]]) -> list[str]:
    """One line with a bar per bin; a bin that is not empty has at least a mark."""
    most = max((count for _, _, count in bins), default=0)
    label = max((len(f"{high - 1:,}") for _, high, _ in bins), default=0)
    lines = []
    for low, high, count in bins:
        bar = BAR * max(round(BAR_WIDTH * count / most), 1) if count else ""
        lines.append(f"  {low:>{label},} – {high - 1:>{label},}  {bar:<{BAR_WIDTH}}  {count:,}")
    return lines


def remarks(found: Mapping[str, Any]) -> list[str]:
    """Clusters, and what was left out and why: sentences."""
    lines = []
    clusters = found["clusters"]
    if clusters:
        lines.append(
            f"near-duplicates: {clusters['number']:,} clusters, the largest of {clusters['largest']:,} documents; "
            f"{_part(clusters['shared'], clusters['documents'])} documents share theirs with another"
        )
        if clusters["on_both_sides"]:
            lines.append(
                f"WARNING: {clusters['on_both_sides']:,} clusters have documents in training and in validation"
            )
    for row in found["left_out"]:
        verb = "damaged" if row["kind"] == "bad" else "left out"
        where = f" of {row['where']}" if row["where"] else ""
        first = f" (first: {clean(row['example'])})" if row["example"] else ""
        lines.append(f"{verb}{where}: {row['count']:,} x {clean(row['reason'])}{first}")
    return lines if found["left_out"] else [*lines, "nothing was left out"]


def size(number: float) -> str:
    """Bytes in the unit that reads best."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number:.0f} bytes"


def _part(count: int, whole: int) -> str:
    return f"{count:,} ({count / whole:.1%})" if whole else f"{count:,}"


def _spread(values: Mapping[str, float] | None) -> str:
    return f"{values['mean']:.2f}, {values['p50']:,}, {values['max']:,}" if values else "–"


def _sides(values: Mapping[str, float] | None) -> str:
    return f"{values['min']:,}, {values['p50']:,}, {values['max']:,}" if values else "–"


def _rate(values: Mapping[str, float] | None, key: str) -> str:
    return f"{values[key]:.3f}" if values else "–"

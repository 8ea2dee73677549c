"""What is in a corpus, in numbers: read from indices, KEY.json and token ids; no picture is opened."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mmtrain.shards import DocumentShards, TokenShards
from mmtrain.tokens import MODALITIES

PERCENTILES = (5, 25, 50, 75, 95, 99)
TOKENS_AT_ONCE = 1 << 22
EOS_TOKENS = 2  # a training sequence is <eos> document <eos>

Advance = Callable[[int], None]


def corpus_statistics(
    documents: Mapping[str, DocumentShards],
    tokens: Mapping[str, TokenShards],
    facts: Mapping[str, Any],
    sequence_length: int,
    advance: Advance = lambda done: None,
) -> dict[str, Any]:
    """Plain JSON values on every split of a corpus.

    documents, tokens: shards by split; a split without tokens has no token statistics. facts: what facts.json holds.
    advance: called with the number of documents read so far, over all splits. One KEY.json in memory at a time.
    """
    clusters: dict[str, Counter[str]] = {}
    splits: dict[str, Any] = {}
    done = 0
    for split, shards in documents.items():
        splits[split], clusters[split] = document_statistics(shards, advance, done)
        done += len(shards)
        if split in tokens:
            splits[split]["tokens"] = token_statistics(tokens[split], sequence_length)
            splits[split]["fertility"] = _fertility(splits[split])
    return {"splits": splits, "clusters": cluster_statistics(clusters), "left_out": left_out(facts)}


def document_statistics(
    shards: DocumentShards, advance: Advance, before: int
) -> tuple[dict[str, Any], Counter[str]]:
    """Numbers on the documents of one split, and how many documents each near-duplicate cluster has.

    before: documents that `advance` has counted already.
    """
    totals: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    clusters: Counter[str] = Counter()
    pictures: Counter[int] = Counter()  # pictures in a document -> documents
    longer: Counter[int] = Counter()  # longer side -> pictures
    shorter: Counter[int] = Counter()
    for i in range(len(shards)):
        content = shards.content(i)
        texts = [text for text in content["texts"] if text is not None]
        names = [name for name in content["images"] if name is not None]
        totals["texts"] += len(texts)
        totals["characters"] += sum(map(len, texts))
        totals["text_bytes"] += sum(len(text.encode("utf-8", "replace")) for text in texts)
        kinds[kind_of(len(texts), len(names))] += 1
        sources[content["source"]] += 1
        pictures[len(names)] += 1
        formats.update(name.rpartition(".")[2] for name in names)
        for info in content["image_info"]:
            if info is not None:
                longer[max(info["width"], info["height"])] += 1
                shorter[min(info["width"], info["height"])] += 1
        if (cluster := cluster_of(content["meta"])) is not None:
            clusters[cluster] += 1
        advance(before + i + 1)
    manifest = shards.manifest
    return {
        "documents": manifest.documents,
        "kinds": {kind: kinds[kind] for kind in ("mixed", "text only", "picture only")},
        "texts": totals["texts"],
        "characters": totals["characters"],
        "text_bytes": totals["text_bytes"],
        "pictures": sum(longer.values()),
        "picture_bytes": int(shards.part_bytes.sum()),
        "picture_formats": dict(formats.most_common()),
        "pictures_per_document": distribution(pictures),
        "longer_side": distribution(longer),
        "shorter_side": distribution(shorter),
        "sources": dict(sources.most_common()),
        "shards": len(manifest.shards),
        "shard_bytes": manifest.bytes,
    }, clusters


def kind_of(num_texts: int, num_pictures: int) -> str:
    """What a document is made of."""
    return "mixed" if num_texts and num_pictures else "text only" if num_texts else "picture only"


def cluster_of(meta: Mapping[str, Any]) -> str | None:
    """Name of the near-duplicate cluster of a document, None where it has none."""
    return str(meta["cluster"]) if "cluster" in meta else None


def token_statistics(shards: TokenShards, sequence_length: int) -> dict[str, Any]:
    """Numbers on the token ids of one split."""
    manifest, lengths = shards.manifest, np.concatenate(list(shards.lengths()))
    total = int(lengths.sum())
    capacity = sequence_length - EOS_TOKENS
    return {
        "total": total,
        "text": manifest.text_tokens,
        "image": manifest.image_tokens,
        "special": total - manifest.text_tokens - manifest.image_tokens,
        "length": distribution(Counter(lengths.tolist())),
        "histogram": histogram(lengths),
        "sequence_length": sequence_length,
        "fit": int((lengths <= capacity).sum()),
        # At least so many: a window never ends inside a picture.
        "windows": int(np.maximum(-(-lengths // capacity), 1).sum()),
        "codes": code_usage(shards),
        "shards": len(manifest.shards),
        "shard_bytes": manifest.bytes,
    }


def code_usage(shards: TokenShards) -> dict[str, Any] | None:
    """Image codes that occur, and the perplexity of their frequencies; None without image tokens.

    Perplexity = exp(entropy): the number of equally frequent codes that would be as hard to predict one by one.
    """
    if not shards.manifest.image_tokens:
        return None
    counts = np.zeros(shards.vocabulary.size, np.int64)
    ends = np.cumsum(np.concatenate(list(shards.lengths())))
    first = 0
    while first < len(shards):
        limit = (ends[first - 1] if first else 0) + TOKENS_AT_ONCE
        last = max(first + 1, int(np.searchsorted(ends, limit)))
        counts += np.bincount(np.concatenate([shards.tokens(i) for i in range(first, last)]), minlength=len(counts))
        first = last
    codes = counts[shards.vocabulary.image_start : shards.vocabulary.image_end]
    share = codes[codes > 0] / codes.sum()
    perplexity = float(np.exp(-(share * np.log(share)).sum()))
    return {"used": int((codes > 0).sum()), "size": len(codes), "perplexity": perplexity}


def cluster_statistics(clusters: Mapping[str, Counter[str]]) -> dict[str, Any] | None:
    """Near-duplicate clusters over all splits; None when the documents carry none.

    shared: documents whose cluster has another document. on_both_sides: clusters with documents in more than one
    split, which must be 0: what is held out would have been seen in training.
    """
    sizes: Counter[str] = Counter()
    for counts in clusters.values():
        sizes.update(counts)
    if not sizes:
        return None
    return {
        "number": len(sizes),
        "largest": max(sizes.values()),
        "shared": sum(size for size in sizes.values() if size > 1),
        "documents": sizes.total(),
        "on_both_sides": sum(sum(name in counts for counts in clusters.values()) > 1 for name in sizes),
    }


def left_out(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the reader counted and did not keep, as rows, most first.

    A row: where, kind ("skipped", "bad"), reason, count, example.
    facts: accounts (`Account.plain`) at the top of facts.json ("where" is "") or per split. They are not added up:
    two splits may have counted the same file.
    """
    accounts = {"": facts, **{key: value for key, value in facts.items() if isinstance(value, Mapping)}}
    rows = [
        {"where": where, "kind": kind, "reason": reason, "count": count}
        | {"example": account.get("examples", {}).get(reason)}
        for where, account in accounts.items()
        for kind in ("skipped", "bad")
        for reason, count in (account.get(kind) or {}).items()
    ]
    return sorted(rows, key=lambda row: -row["count"])


def distribution(counts: Mapping[int, int]) -> dict[str, float] | None:
    """Mean, extremes and percentiles (nearest rank) of values that occur so often; None without any."""
    if not counts:
        return None
    values = np.array(sorted(counts), np.int64)
    ranks = np.cumsum([counts[value] for value in values.tolist()])
    n = int(ranks[-1])
    at = {f"p{p}": int(values[np.searchsorted(ranks, np.ceil(n * p / 100))]) for p in PERCENTILES}
    mean = sum(value * count for value, count in counts.items()) / n
    return {"mean": mean, "min": int(values[0]), **at, "max": int(values[-1])}


def histogram(lengths: np.ndarray) -> list[list[int]]:
    """Rows [low, high, documents] with low <= length < high, four bins to a doubling; from the first to the last."""
    if not len(lengths):
        return []
    last = int(lengths.max())
    edges = np.unique(np.ceil(2 ** (np.arange(4 * last.bit_length() + 2) / 4)).astype(np.int64))
    edges = np.concatenate([[0], edges])
    counts, _ = np.histogram(lengths, edges)
    used = np.flatnonzero(counts)
    bins = range(int(used[0]), int(used[-1]) + 1)
    return [[int(edges[i]), int(edges[i + 1]), int(counts[i])] for i in bins]


def _fertility(split: Mapping[str, Any]) -> dict[str, float] | None:
    """Text tokens per character and per UTF-8 byte; None without text."""
    if not split["characters"]:
        return None
    text = split["tokens"][MODALITIES[1]]
    return {"per_character": text / split["characters"], "per_byte": text / split["text_bytes"]}

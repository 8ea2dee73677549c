"""`mmtrain data`: documents, tokenizers and token shards of a corpus, with their statistics."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np

from mmtrain.config.compose import compose
from mmtrain.shards import Manifest, TokenShards
from mmtrain.track import closing_box
from mmtrain.verbs import prepare


def main(argv: list[str]) -> int:
    """Build what is missing and print what is there."""
    config = compose(argv)
    documents = prepare.prepare_documents(config)
    text = prepare.prepare_text_tokenizer(config, documents)
    image = prepare.prepare_image_tokenizer(config, documents)
    tokens = prepare.prepare_tokens(config, documents, text, image)
    facts = json.loads((documents / "facts.json").read_text())
    places = {"documents": os.path.relpath(documents), "tokens": os.path.relpath(tokens)}
    for split in prepare.SPLITS:
        places[split] = describe(tokens / split)
        skipped = facts[split]["skipped"]
        if skipped:
            places[f"{split}, skipped"] = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    closing_box(f"corpus {config.corpus.name}", places)
    return 0


def describe(folder: Path) -> str:
    """One line on a folder of token shards."""
    manifest = Manifest.load(folder)
    counts: Counter[int] = Counter()  # of documents by length: the lengths themselves may be billions
    for shard in TokenShards(folder).lengths():
        lengths, documents = np.unique(shard, return_counts=True)
        counts.update(dict(zip(lengths.tolist(), documents.tolist(), strict=True)))
    lengths, documents = np.array(sorted(counts.items())).T
    median = lengths[np.searchsorted(np.cumsum(documents), (manifest.documents + 1) // 2)]
    return (
        f"{manifest.documents:,} documents, {manifest.text_tokens:,} text and {manifest.image_tokens:,} image tokens, "
        f"{manifest.bytes / 1e6:.1f} MB in {len(manifest.shards)} shards, median length {median}, "
        f"longest {lengths[-1]}"
    )

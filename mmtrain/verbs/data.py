"""`mmtrain data`: from a corpus to document and token shards, and looking at them."""

import difflib
import importlib
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np

from mmtrain.config import Config, UserError
from mmtrain.config.compose import compose
from mmtrain.shards import Manifest, TokenShards
from mmtrain.track import closing_box
from mmtrain.verbs.build import SPLITS

STEPS = ("build", "tokenize")
LOOKS = ("verify", "inspect", "stats", "browse")
"""Subverbs in modules of their own, `main(config, words) -> int`; words are what is no setting."""


def main(argv: list[str]) -> int:
    """Do what the first word names; without one, build and tokenize."""
    words = [argument for argument in argv if "=" not in argument and not argument.startswith("-")]
    config = compose([argument for argument in argv if argument not in words])
    step = words[0] if words else STEPS[-1]
    if step in LOOKS:
        return importlib.import_module(f"mmtrain.verbs.{step}").main(config, words[1:])
    if step not in STEPS or len(words) > 1:
        raise UserError(_unknown(words[-1]))
    _prepare(config, step)
    return 0


def _prepare(config: Config, step: str) -> None:
    """Build what is missing and say what is there."""
    from mmtrain.verbs import prepare

    places = {}
    documents = prepare.prepare_documents(config)
    tokens: dict[str, Path] = {}
    if step == "tokenize":
        text = prepare.prepare_text_tokenizer(config, documents)
        image = prepare.prepare_image_tokenizer(config, documents)
        tokens = prepare.prepare_tokens(config, documents, text, image)
    for name in tokens or documents:
        of = f" of {name}" if len(config.sources) > 1 else ""
        if name in documents:  # else its tokens were ready
            places[f"documents{of}"] = os.path.relpath(documents[name])
        if tokens:
            places[f"tokens{of}"] = os.path.relpath(tokens[name])
        for split in SPLITS:
            places[f"{split}{of}"] = describe((tokens or documents)[name] / split)
        if name in documents and (skipped := left_out(documents[name])):
            places[f"left out{of}"] = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
    if step == "build":
        places["next"] = "the same command with tokenize instead of build"
    closing_box(f"corpus {', '.join(config.sources)}", places)


def describe(folder: Path) -> str:
    """One line on a folder of shards."""
    manifest = Manifest.load(folder)
    size = f"{manifest.bytes / 1e6:.1f} MB in {len(manifest.shards)} shards"
    if manifest.kind == "documents":
        return f"{manifest.documents:,} documents, {size}"
    counts: Counter[int] = Counter()  # of documents by length: the lengths themselves may be billions
    for shard in TokenShards(folder).lengths():
        lengths, documents = np.unique(shard, return_counts=True)
        counts.update(dict(zip(lengths.tolist(), documents.tolist(), strict=True)))
    lengths, documents = np.array(sorted(counts.items())).T
    median = lengths[np.searchsorted(np.cumsum(documents), (manifest.documents + 1) // 2)]
    return (
        f"{manifest.documents:,} documents, {manifest.text_tokens:,} text and {manifest.image_tokens:,} image tokens, "
        f"{size}, median length {median}, longest {lengths[-1]}"
    )


def left_out(documents: Path) -> dict[str, int]:
    """Why and how often something of a corpus is not among its documents."""
    facts = json.loads((documents / "facts.json").read_text())
    counts = {**facts.get("bad", {}), **facts.get("skipped", {})}
    for split in SPLITS:  # as mmtrain 0.1 wrote it
        counts |= facts[split].get("skipped", {})
    return counts


def _unknown(word: str) -> str:
    close = difflib.get_close_matches(word, [*STEPS, *LOOKS], n=1, cutoff=0.5)
    hint = f"did you mean `mmtrain data {close[0]}`?" if close else f"there is {', '.join([*STEPS, *LOOKS])}"
    return f"mmtrain data {word}: {word!r} is no part of `mmtrain data`; {hint}"

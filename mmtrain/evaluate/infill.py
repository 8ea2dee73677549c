"""Infilling: one word of each held-out caption is masked; the model fills it in, seeing the rest and the picture."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmtrain.config.randomness import random_stream
from mmtrain.documents import Document
from mmtrain.documents.scene import BACKGROUNDS, COLORS, SHAPES
from mmtrain.evaluate.intervals import Proportion, wilson
from mmtrain.generate import MASK, Request, Sampler, SamplingSettings

KINDS = {"color": COLORS, "shape": SHAPES, "background": BACKGROUNDS}


@dataclass(frozen=True)
class MaskedWord:
    """A caption with one word replaced by [MASK]; kind: color, shape, background or other."""

    caption: str
    word: str
    kind: str


def mask_word(caption: str, key: tuple[int | str, ...]) -> MaskedWord:
    """Mask one of the words of `caption`, each with the same probability, drawn from the stream `key`."""
    words = list(re.finditer(r"\w+", caption))
    match = words[int(random_stream(*key).integers(len(words)))]
    word = match.group()
    kind = next((name for name, known in KINDS.items() if word in known), "other")
    return MaskedWord(caption[: match.start()] + MASK + caption[match.end() :], word, kind)


def measure_infill(
    sampler: Sampler, documents: Sequence[Document], pictures: np.ndarray, seed: int
) -> tuple[dict[str, Proportion], list[tuple[MaskedWord, str]]]:
    """Share of masked words that greedy infilling writes exactly, by kind and over all.

    pictures: (N, S, S, 3) uint8, those of `documents`. Returns also each masked word with the caption as filled in.
    """
    masked = [mask_word(document.texts[0], (seed, "infill", document.id)) for document in documents]
    greedy = SamplingSettings(temperature=0.0)
    requests = [Request(word.caption, picture) for word, picture in zip(masked, pictures, strict=True)]
    samples = sampler.draw(sampler.tasks("infill_text", requests, greedy), greedy)
    written = [(word, sample.text) for word, sample in zip(masked, samples, strict=True)]
    is_right = [text == document.texts[0] for (_, text), document in zip(written, documents, strict=True)]
    shares = {}
    for kind in (*KINDS, "other", "all"):
        right = [r for r, (word, _) in zip(is_right, written, strict=True) if kind in (word.kind, "all")]
        if right:
            shares[kind] = wilson(sum(right), len(right))
    return shares, written

"""Infilling: one word of each held-out caption is masked, and the model fills it in, seeing the rest and the picture."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmtrain.config.randomness import random_stream
from mmtrain.documents import Document
from mmtrain.documents.scene import BACKGROUNDS, COLORS, SHAPES
from mmtrain.evaluate.intervals import Proportion, wilson
from mmtrain.generate import MASK, Sampler, SamplingSettings

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

    pictures: (N, S, S, 3) uint8, those of `documents`. Returns also every word with what was written for it.
    """
    masked = [mask_word(document.texts[0], (seed, "infill", document.id)) for document in documents]
    greedy = SamplingSettings(temperature=0.0, guidance=1.0)
    written = sampler.infill_texts([word.caption for word in masked], greedy, seed, pictures=pictures)
    filled = [(word, sample.fills[0].strip()) for word, sample in zip(masked, written, strict=True)]
    by_kind = {name: [w.word == text for w, text in filled if w.kind == name] for name in (*KINDS, "other")}
    by_kind["all words"] = [word.word == text for word, text in filled]
    return {name: wilson(sum(right), len(right)) for name, right in by_kind.items()}, filled

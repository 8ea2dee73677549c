"""Causal masking: spans move to the end of the sequence, where the model writes them (CM3, arXiv 2201.07520).

`<eos> a b c <break> d e <eos>` with the span `b c` masked becomes
`<eos> a <sentinel:0> <break> d e <eos> <sentinel:0> b c <eoss>`.
"""

import numpy as np

from mmtrain.config import ObjectiveConfig
from mmtrain.objective.causal import causal
from mmtrain.objective.cells import NO_CELL, picture_cells
from mmtrain.objective.sequence import TrainingSequence, mark_retrieved, target_weights
from mmtrain.tokens import MODALITIES, Vocabulary

TEXT = MODALITIES.index("text")
TOKENS_PER_MASK = 3  # a sentinel in the text, a sentinel before the span, an <eoss> after it


def cm3(
    tokens: np.ndarray,
    num_retrieved: int,
    vocabulary: Vocabulary,
    config: ObjectiveConfig,
    rng: np.random.Generator,
    num_masks: int | None = None,
) -> TrainingSequence:
    """Mask spans of an assembled sequence, wherever in it they fall, retrieved documents and captions included.

    tokens, num_retrieved: as `assemble` returns them. num_masks: masks wanted (default: drawn as `config` says);
    there are fewer where the sequence has no room for so many disjoint spans.
    Returns a sequence of `len(tokens) + 3 * num_masks` ids.
    """
    if num_masks is None:
        num_masks = draw_num_masks(config, rng)
    starts, ends = draw_spans(tokens, vocabulary, config, rng, num_masks)
    if len(starts) == 0:
        return causal(tokens, num_retrieved, vocabulary, config)
    is_retrieved = mark_retrieved(len(tokens), num_retrieved)
    sentinels = np.arange(vocabulary.sentinel_start, vocabulary.sentinel_start + len(starts))
    rotated = rotate(tokens, starts, ends, sentinels, np.full(len(starts), vocabulary.eoss))
    inherited = is_retrieved[starts]
    is_retrieved = rotate(is_retrieved, starts, ends, inherited, inherited)
    weight = target_weights(rotated, is_retrieved, vocabulary, config)
    outside = np.full(len(starts), NO_CELL)
    cell = rotate(picture_cells(tokens, vocabulary), starts, ends, outside, outside)
    return TrainingSequence(rotated, weight, is_retrieved, cell, num_masks=len(starts))


def draw_num_masks(config: ObjectiveConfig, rng: np.random.Generator) -> int:
    """Masks of one sequence, within [min_masks, num_sentinels]; `masks=none` means none at all."""
    if config.masks == "none":
        return 0
    drawn = int(rng.poisson(config.num_masks)) if config.masks == "poisson" else round(config.num_masks)
    return min(max(drawn, config.min_masks), config.num_sentinels)


def draw_spans(
    tokens: np.ndarray, vocabulary: Vocabulary, config: ObjectiveConfig, rng: np.random.Generator, num_masks: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose up to `num_masks` disjoint, non-empty spans, at least one where there is anything that may be masked.

    `<break>` and `<eos>` are boundaries: no span holds one. With `whole_segment_probability` the spans are whole
    segments, drawn without replacement; else they follow `span_policy`. tokens: as `assemble` returns them.
    Returns sorted starts and ends (exclusive), (m,) int64.
    """
    if num_masks == 0:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    edges = np.flatnonzero((tokens == vocabulary.brk) | (tokens == vocabulary.eos))  # an <eos> at both ends
    starts, lengths = edges[:-1] + 1, edges[1:] - edges[:-1] - 1
    if not lengths.all():
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    if len(starts) == 0:
        return starts, starts
    whole = rng.random() < config.whole_segment_probability
    if not whole and config.span_policy == "clip":
        return _clipped_spans(starts, lengths, rng, num_masks)
    if whole and config.whole_segments == "text":
        is_text = vocabulary.modality(tokens[starts].astype(np.int64)) == TEXT
        starts, lengths = starts[is_text], lengths[is_text]
    chosen = np.sort(rng.permutation(len(starts))[:num_masks])
    starts, lengths = starts[chosen], lengths[chosen]
    if whole:
        return starts, starts + lengths
    draws = rng.integers(0, lengths, size=(2, len(chosen)))
    return starts + draws.min(axis=0), starts + draws.max(axis=0) + 1


def _clipped_spans(
    starts: np.ndarray, lengths: np.ndarray, rng: np.random.Generator, num_masks: int
) -> tuple[np.ndarray, np.ndarray]:
    """Spans over the whole sequence, each clipped to the segment it overlaps most (metaseq's cm3_dataset.py).

    Ends are drawn among the tokens that may be masked, boundaries left out, so that no span is empty. For n > 1
    there are n^2 candidates, of which the first n that do not intersect are kept, possibly fewer.
    starts, lengths: (k,) segments. Returns sorted starts and ends.
    """
    cumulated = np.concatenate([[0], np.cumsum(lengths)])
    draws = rng.integers(0, cumulated[-1], size=(num_masks * num_masks, 2))
    candidates = np.stack([draws.min(axis=1), draws.max(axis=1) + 1], axis=1)
    if num_masks > 1:
        kept: list[list[int]] = []
        for low, high in candidates.tolist():
            if len(kept) < num_masks and all(high <= start or low >= end for start, end in kept):
                kept.append([low, high])
        candidates = np.array(sorted(kept))
    low, high = candidates[:, :1], candidates[:, 1:]
    overlap = np.minimum(high, cumulated[1:]) - np.maximum(low, cumulated[:-1])
    segment = overlap.argmax(axis=1)
    shift = starts[segment] - cumulated[segment]
    return (
        np.maximum(low[:, 0], cumulated[segment]) + shift,
        np.minimum(high[:, 0], cumulated[segment + 1]) + shift,
    )


def rotate(
    values: np.ndarray, starts: np.ndarray, ends: np.ndarray, sentinels: np.ndarray, closings: np.ndarray
) -> np.ndarray:
    """Replace each span by its sentinel and append `sentinel span closing` for each, in order.

    values: (n,) of any type. starts, ends: (m,) sorted disjoint spans. sentinels, closings: (m,) values to write.
    Returns (n + 3 m,) of the type of `values`.
    """
    out = np.empty(len(values) + TOKENS_PER_MASK * len(starts), dtype=values.dtype)
    source = target = 0
    infill = len(values) + len(starts) - int((ends - starts).sum())
    for start, end, sentinel, closing in zip(
        starts.tolist(), ends.tolist(), sentinels.tolist(), closings.tolist(), strict=True
    ):
        kept, length = start - source, end - start
        out[target : target + kept] = values[source:start]
        out[target + kept] = sentinel
        out[infill] = sentinel
        out[infill + 1 : infill + 1 + length] = values[start:end]
        out[infill + 1 + length] = closing
        source, target, infill = end, target + kept + 1, infill + length + 2
    out[target : target + len(values) - source] = values[source:]
    return out


def unrotate(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Put the spans of a rotated sequence back where their sentinels stand: the inverse of `rotate`.

    tokens: (n,) ids, with an `<eos>` before the first infill. Raises ValueError where sentinels and spans do not pair.
    """
    end = int(np.flatnonzero(tokens == vocabulary.eos)[-1]) + 1
    source, tail = tokens[:end], tokens[end:]
    places = np.flatnonzero((source >= vocabulary.sentinel_start) & (source < vocabulary.sentinel_end))
    opened = np.flatnonzero((tail >= vocabulary.sentinel_start) & (tail < vocabulary.sentinel_end))
    closed = np.flatnonzero(tail == vocabulary.eoss)
    if not np.array_equal(source[places], tail[opened]) or len(closed) != len(opened):
        raise ValueError("the sentinels before and after <eos> differ, or an infill has no <eoss>")
    pieces, done = [], 0
    for place, start, stop in zip(places.tolist(), opened.tolist(), closed.tolist(), strict=True):
        pieces += [source[done:place], tail[start + 1 : stop]]
        done = place + 1
    return np.concatenate([*pieces, source[done:]])

"""Documents side by side in one sequence: retrieved ones first, the query document last."""

from collections.abc import Sequence

import numpy as np

from mmtrain.config import UserError
from mmtrain.tokens import Vocabulary


def assemble(query: np.ndarray, retrieved: Sequence[np.ndarray], vocabulary: Vocabulary) -> tuple[np.ndarray, int]:
    """`<eos> R1 <break> R2 <break> ... Q <eos>` (CM3leon, figures 8 and 9).

    query and each of retrieved: (n,) ids of one document. Returns (ids of `vocabulary.dtype`, number of ids
    between the first `<eos>` and the query).
    """
    num_retrieved = sum(len(document) + 1 for document in retrieved)
    tokens = np.empty(num_retrieved + len(query) + 2, dtype=vocabulary.dtype)
    tokens[0] = tokens[-1] = vocabulary.eos
    end = 1
    for document in retrieved:
        tokens[end : end + len(document)] = document
        tokens[end + len(document)] = vocabulary.brk
        end += len(document) + 1
    tokens[end:-1] = query
    return tokens, num_retrieved


def arrange(document: np.ndarray, vocabulary: Vocabulary, order: str, rng: np.random.Generator) -> np.ndarray:
    """Put the two segments of a caption-image pair in the wanted order; other documents stay as they are.

    document: (n,) ids. order: text_first, image_first or random (one draw from `rng`).
    """
    breaks = np.flatnonzero(document == vocabulary.brk)
    if len(breaks) != 1:
        return document
    cut = int(breaks[0])
    first, second = document[:cut], document[cut + 1 :]
    if not (len(first) and len(second)):
        return document
    image_first = vocabulary.image_start <= int(first[0]) < vocabulary.image_end
    if image_first == (vocabulary.image_start <= int(second[0]) < vocabulary.image_end):
        return document
    wants_image_first = order == "image_first" if order != "random" else rng.random() < 0.5
    if image_first == wants_image_first:
        return document
    return np.concatenate([second, document[cut : cut + 1], first])


def split_windows(document: np.ndarray, vocabulary: Vocabulary, limit: int) -> list[np.ndarray]:
    """The document as consecutive windows of at most `limit` ids: as many whole segments as fit in each.

    The `<break>` between two windows falls away; a text segment longer than a window is cut. Nothing else is lost.
    document: (n,) ids. Returns views of it, one where it fits.
    Raises UserError for a picture that does not fit: half a picture is no picture.
    """
    if len(document) <= limit:
        return [document]
    breaks = np.flatnonzero(document == vocabulary.brk)
    windows = []
    start = 0
    while len(document) - start > limit:
        before = int(np.searchsorted(breaks, start + limit, side="right")) - 1
        end = int(breaks[before]) if before >= 0 else -1
        if end > start:
            windows.append(document[start:end])
            start = end + 1
            continue
        if vocabulary.image_start <= int(document[start]) < vocabulary.image_end:
            raise UserError(
                f"a picture does not fit a sequence: only {limit} tokens are free between the <eos> tokens; "
                "set a larger stream.sequence_length or image_tokenizer.downsample"
            )
        windows.append(document[start : start + limit])
        start += limit
    return [*windows, document[start:]]


def fit_retrieved(retrieved: Sequence[np.ndarray], limit: int) -> list[np.ndarray]:
    """Those of `retrieved`, in order, that with a `<break>` each still fit into `limit` ids; never a part of one."""
    kept = []
    for document in retrieved:
        if len(document) + 1 <= limit:
            kept.append(document)
            limit -= len(document) + 1
    return kept

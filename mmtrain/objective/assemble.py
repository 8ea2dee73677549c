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


def fit_query(query: np.ndarray, vocabulary: Vocabulary, limit: int) -> np.ndarray:
    """The longest run of leading whole segments with at most `limit` ids; a leading text longer than that is cut.

    Raises UserError when the first segment is a picture that does not fit: half a picture is no picture.
    """
    if len(query) <= limit:
        return query
    breaks = np.flatnonzero(query[: limit + 1] == vocabulary.brk)
    if len(breaks):
        return query[: breaks[-1]]
    if vocabulary.image_start <= int(query[0]) < vocabulary.image_end:
        raise UserError(
            f"a picture does not fit a sequence: only {limit} tokens are free between the <eos> tokens; "
            "set a larger stream.sequence_length or image_tokenizer.downsample"
        )
    return query[:limit]


def fit_retrieved(retrieved: Sequence[np.ndarray], limit: int) -> list[np.ndarray]:
    """Those of `retrieved`, in order, that with a `<break>` each still fit into `limit` ids; never a part of one."""
    kept = []
    for document in retrieved:
        if len(document) + 1 <= limit:
            kept.append(document)
            limit -= len(document) + 1
    return kept

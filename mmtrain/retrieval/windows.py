"""Windows: what is retrieved of a document. One with at most one picture is one window; else each picture closes one.

The text after the last picture belongs to the last window. The cut depends on the pictures alone, so that a document
and its tokens have the same windows, whatever a tokenizer makes of an empty text.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mmtrain.config import UserError
from mmtrain.documents import Document, Image
from mmtrain.shards import DocumentShards, TokenShards


def cut(is_image: Sequence[bool]) -> list[tuple[int, int]]:
    """First and last (exclusive) segment of each window of a document; is_image: of each segment, in order."""
    closing = [i + 1 for i, image in enumerate(is_image) if image]
    starts = [0, *closing[:-1]]
    return list(zip(starts, [*starts[1:], len(is_image)], strict=True))


def windows_of(document: Document) -> list[Document]:
    """The windows of a document, as documents with its id, source and meta."""
    segments = document.segments
    return [
        replace(document, segments=segments[start:stop])
        for start, stop in cut([isinstance(segment, Image) for segment in segments])
    ]


def window_tokens(shards: TokenShards, document: int, number: int, count: int) -> np.ndarray:
    """Ids of window `number` of the `count` windows of a document: (n,), a view of the memory-mapped shard.

    Raises UserError where the document has another number of windows.
    """
    tokens = shards.tokens(document)
    if count == 1:  # most documents; the segments need not be looked at
        return tokens
    segments = shards.segments(document)
    bounds = cut([segment.kind == "image" for segment in segments])
    if len(bounds) != count:
        raise UserError(
            f"document {shards.id(document)} has {len(bounds)} windows, not the {count} that were searched; build the "
            "neighbours again"
        )
    first, last = bounds[number][0], bounds[number][1] - 1
    return tokens[segments[first].start : segments[last].start + segments[last].length]


def window_document(shards: DocumentShards, document: int, number: int, count: int) -> Document:
    """Window `number` of the `count` windows of a document, as `windows_of` cuts it."""
    return windows_of(shards[document])[number] if count > 1 else shards[document]

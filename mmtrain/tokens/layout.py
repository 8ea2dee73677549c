"""Token layout of a document: `T1 <break> I1 <break> T2 ...` and the way back."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmtrain.config import UserError
from mmtrain.documents import Document
from mmtrain.tokens.text import TextTokenizer
from mmtrain.tokens.vocabulary import MODALITIES, SPECIAL, Vocabulary


@dataclass(frozen=True)
class TokenSegment:
    """A run of tokens of one kind inside a document."""

    kind: str
    """"text" or "image"."""
    start: int
    length: int


@dataclass(frozen=True)
class TokenDocument:
    """A document as ids of the vocabulary."""

    id: str
    tokens: np.ndarray
    """(n,) of `vocabulary.dtype`; one `<break>` between segments, none at the ends."""
    segments: tuple[TokenSegment, ...]
    meta: dict[str, Any]


def document_to_tokens(
    document: Document, text: TextTokenizer, codes_of_images: list[np.ndarray], vocabulary: Vocabulary
) -> TokenDocument:
    """Lay out a document as tokens.

    codes_of_images: one array of 0-based codes per image segment, in order, each flattened row by row.
    A text that has no token (the empty text) leaves no segment.
    Raises UserError when ids do not fit the vocabulary or the images do not match the codes.
    """
    num_images = sum(not isinstance(segment, str) for segment in document.segments)
    if num_images != len(codes_of_images):
        raise UserError(f"document {document.id} has {num_images} images but codes for {len(codes_of_images)}")
    ranges = {
        "text": (vocabulary.text_start, vocabulary.text_end),
        "image": (vocabulary.image_start, vocabulary.image_end),
    }
    remaining = iter(codes_of_images)
    pieces: list[np.ndarray] = []
    segments: list[TokenSegment] = []
    position = 0
    for segment in document.segments:
        kind = "text" if isinstance(segment, str) else "image"
        local = text.encode(segment) if isinstance(segment, str) else next(remaining)
        start, end = ranges[kind]
        ids = np.asarray(local, dtype=np.int64).reshape(-1) + start
        if not ids.size:
            continue
        if ids.min() < start or ids.max() >= end:
            raise UserError(
                f"document {document.id} has {kind} ids outside the vocabulary's {end - start}; "
                f"the {kind} tokenizer is not the one the vocabulary was made for"
            )
        if pieces:
            pieces.append(np.array([vocabulary.brk]))
            position += 1
        pieces.append(ids)
        segments.append(TokenSegment(kind, position, ids.size))
        position += ids.size
    tokens = np.concatenate(pieces) if pieces else np.empty(0)
    return TokenDocument(document.id, tokens.astype(vocabulary.dtype), tuple(segments), dict(document.meta))


def tokens_to_segments(tokens: np.ndarray, vocabulary: Vocabulary) -> list[tuple[str, np.ndarray]]:
    """Split ids into segments: maximal runs of one modality; specials separate and vanish.

    tokens: (n,) ids, also as a model wrote them. Returns ("text", text ids) and ("image", codes) in order,
    0-based int64.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    modality = vocabulary.modality(ids)
    edges = np.flatnonzero(np.diff(modality)) + 1
    starts = {"text": vocabulary.text_start, "image": vocabulary.image_start}
    segments = []
    for run in np.split(np.arange(ids.size), edges):
        if run.size and modality[run[0]] != SPECIAL:
            kind = MODALITIES[modality[run[0]]]
            segments.append((kind, ids[run] - starts[kind]))
    return segments

"""A record from a stranger: parsed with care, refused with a reason to count by."""

import json
import math
from typing import Any

from mmtrain.documents.corpus import printable

# Text of one document: longer than any book. It bounds what a parser of JSON can be made to hold.
LARGEST_TEXT_BYTES = 2**24
DEEPEST_META = 16


class BadRecord(Exception):
    """A record that makes no document. The message is one of a few fixed phrases to count by."""


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`. Raises BadRecord."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, a number of thousands of digits; nested too deep
        content = None
    if not isinstance(content, dict):
        raise BadRecord("json is no JSON object")
    return content


def plain(value: Any, depth: int = DEEPEST_META) -> Any:
    """A parsed JSON value that any JSON writer takes: no lone surrogate, NaN or infinity, not nested deep.

    Raises BadRecord.
    """
    if depth == 0:
        raise BadRecord("meta nested too deep")
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [plain(entry, depth - 1) for entry in value]
    if isinstance(value, dict):
        return {printable(key): plain(entry, depth - 1) for key, entry in value.items()}
    return value


def aligned(texts: list[Any] | None, images: list[Any] | None) -> list[tuple[str | None, Any]]:
    """(text, None) or (None, image) per position of the two lists of OBELICS; a list that is empty or None is nulls.

    Raises BadRecord unless exactly one of the two is there at every position.
    """
    if texts is None and images is None:
        raise BadRecord("neither texts nor images")
    texts = texts or [None] * len(images or ())
    images = images or [None] * len(texts)
    if len(texts) != len(images) or any(
        (text is None) == (image is None) for text, image in zip(texts, images, strict=True)
    ):
        raise BadRecord("texts and images are not aligned")
    if not all(text is None or isinstance(text, str) for text in texts):
        raise BadRecord("a text that is no string")
    return list(zip(texts, images, strict=True))

"""The document: ordered segments of text and encoded pictures."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Image:
    """An encoded picture: bytes as they are stored, size from its header, SHA-256 of the bytes.

    `extension` is "png", "jpg" or "webp".
    """

    data: bytes = field(repr=False)
    width: int
    height: int
    sha256: str
    extension: str


@dataclass(frozen=True)
class Document:
    """Text and pictures in reading order.

    id: unique in the corpus, the same at every reading, only of A-Z a-z 0-9 _ - (a webdataset key ends at
    the first dot). source: name of the corpus. meta: plain JSON values, such as the ground truth of a scene.
    """

    id: str
    source: str
    segments: tuple[str | Image, ...]
    meta: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        """The text segments in order."""
        return [segment for segment in self.segments if isinstance(segment, str)]

    @property
    def images(self) -> list[Image]:
        """The picture segments in order."""
        return [segment for segment in self.segments if isinstance(segment, Image)]

"""Document vectors: the mean of a text vector and an image vector, each of unit norm (CM3leon, section 2.1)."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mmtrain.config import RetrievalConfig, UserError
from mmtrain.documents import BadImage, Document, decode_square
from mmtrain.retrieval.hashed import PICTURE_SIZE, encode_picture, encode_text, unit

# Means are shrunk as if this many documents with a zero vector were in the memory: the mean of very few documents
# is those documents, and centering would leave nothing of them.
MEAN_PRIOR = 8


@dataclass(frozen=True)
class Parts:
    """Text and image vectors of documents: (n, d) float32 each, of unit norm, zeros where a document has none."""

    text: np.ndarray
    image: np.ndarray

    def means(self) -> np.ndarray:
        """(2, d) float32: mean text and mean image vector over the documents that have them."""
        return np.stack([_mean(self.text), _mean(self.image)])


def encode_document(document: Document, config: RetrievalConfig, means: np.ndarray | None = None) -> np.ndarray:
    """Vector of one document: (d,) float32 of unit norm; zeros for a document with neither words nor pictures.

    means: (2, d) of the memory it is to be compared with (`Parts.means`); what all documents share, such as the
    words of a caption template, is then left out, and unrelated documents have cosines near 0.
    Raises UserError for a picture that cannot be decoded.
    """
    return combine(encode_parts([document], config), means)[0]


def encode_parts(documents: Iterable[Document], config: RetrievalConfig) -> Parts:
    """Text and image vectors of documents; several pictures of one document are averaged."""
    texts, images = [], []
    for document in documents:
        texts.append(encode_text("\n".join(document.texts), config.dimension))
        images.append(_encode_images(document, config.dimension))
    empty = np.zeros((0, config.dimension), dtype=np.float32)
    return Parts(np.stack(texts), np.stack(images)) if texts else Parts(empty, empty)


def combine(parts: Parts, means: np.ndarray | None = None) -> np.ndarray:
    """Document vectors (n, d) float32: each part centered, normalized, averaged over those there are, normalized."""
    total = np.zeros_like(parts.text)
    for number, part in enumerate((parts.text, parts.image)):
        is_there = part.any(axis=1, keepdims=True)
        centered = part if means is None else part - means[number]
        total += np.where(is_there, unit(centered), 0.0)
    return unit(total)


def _encode_images(document: Document, dimension: int) -> np.ndarray:
    vectors = np.zeros(dimension, dtype=np.float32)
    for image in document.images:
        try:
            vectors += encode_picture(decode_square(image.data, PICTURE_SIZE), dimension)
        except BadImage as error:
            raise UserError(
                f"a picture of document {document.id} is damaged ({error}); write the shards again"
            ) from error
    return unit(vectors)


def _mean(vectors: np.ndarray) -> np.ndarray:
    return vectors.sum(axis=0) / (np.count_nonzero(vectors.any(axis=1)) + MEAN_PRIOR)

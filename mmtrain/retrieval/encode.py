"""Vectors of documents: unit mean of a unit text vector and a unit image vector (CM3leon, section 2.1), and columns
of what the search must know of each document beside them."""

import hashlib
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from mmtrain.config import UserError
from mmtrain.config.randomness import random_stream
from mmtrain.documents import BadImage, Document, decode_square
from mmtrain.retrieval.blocklist import BlockList
from mmtrain.retrieval.encoders import Encoder
from mmtrain.retrieval.windows import windows_of

TEXT, IMAGE = CHANNELS = (0, 1)  # of a search: who asks with its text, and with its pictures
# Means are shrunk as if this many documents with a zero vector were in the memory: the mean of very few documents
# is those documents, and centering would leave nothing of them.
MEAN_PRIOR = 8
BATCH = 256


@dataclass(frozen=True)
class Encoded:
    """n documents with w windows, as columns in the order of the documents.

    windows: (w, 3) int64, the document's number, the window's, and how many windows the document has. text, image:
    (w, d) float16 of unit norm, zeros where the window has none. picture: (w,) uint64, digest of the window's
    picture, 0 without. id, cluster: (w,) uint64, hashes of the document's id and of its near-duplicate cluster.
    blocked: (w,) bool, found in an evaluation set. queries: (n, 2, d) float16, the document as a text query (with
    dropped words) and as an image query.
    """

    windows: np.ndarray
    text: np.ndarray
    image: np.ndarray
    picture: np.ndarray
    id: np.ndarray
    cluster: np.ndarray
    blocked: np.ndarray
    queries: np.ndarray

    def save(self, path: Path) -> None:
        """Write an .npz without pickles."""
        with open(path, "wb") as file:
            np.savez(file, **{item.name: getattr(self, item.name) for item in fields(self)})

    @classmethod
    def load(cls, path: Path) -> "Encoded":
        """Read what `save` wrote. Raises UserError for a damaged file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(*(file[item.name] for item in fields(cls)))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} holds no encoded documents ({error}); delete its folder, prepare again") from error


def encode_documents(
    documents: Iterable[Document],
    encoder: Encoder,
    first: int = 0,
    query_dropout: float = 0.0,
    seed: int = 0,
    block: BlockList | None = None,
) -> Encoded:
    """Encode documents, whose numbers start at `first`.

    query_dropout: share of a query's words that are left out of the text query (a query with no word left keeps
    all), drawn from (seed, id). Raises UserError for a picture that cannot be decoded and a vector that is not finite.
    """
    parts: list[Encoded] = []
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == BATCH:
            parts.append(_encode_batch(batch, encoder, first + len(parts) * BATCH, query_dropout, seed, block))
            batch = []
    parts.append(_encode_batch(batch, encoder, first + len(parts) * BATCH, query_dropout, seed, block))
    return Encoded(*(np.concatenate([getattr(part, item.name) for part in parts]) for item in fields(Encoded)))


def _encode_batch(
    documents: Sequence[Document],
    encoder: Encoder,
    first: int,
    query_dropout: float,
    seed: int,
    block: BlockList | None,
) -> Encoded:
    cut = [windows_of(document) for document in documents]
    windows = [window for of_document in cut for window in of_document]
    places = [(first + i, k, len(of)) for i, of in enumerate(cut) for k in range(len(of))]
    texts = ["\n".join(window.texts) for window in windows]
    contents = [(window.texts, window.images[0] if window.images else None) for window in windows]
    text = encoder.encode_texts(texts)
    image = np.zeros((len(windows), encoder.dimension), np.float32)
    with_picture = [i for i, window in enumerate(windows) if window.images]
    if with_picture:
        image[with_picture] = encoder.encode_pictures(
            np.stack([decoded(windows[i], encoder.picture_size) for i in with_picture])
        )
    owner = np.array([place[0] - first for place in places], np.int64)
    total = np.zeros((len(documents), encoder.dimension), np.float32)
    np.add.at(total, owner, image)
    dropped = [_drop_words("\n".join(d.texts), query_dropout, seed, d.id) for d in documents]
    queries = np.stack([encoder.encode_texts(dropped), unit(total)], axis=1)
    for name, vectors, owners in (("text", text, windows), ("image", image, windows), ("query", queries, documents)):
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=tuple(range(1, vectors.ndim))))
        if len(bad):
            raise UserError(
                f"the {name} vector of document {owners[bad[0]].id} is not finite; the encoder is damaged, or was "
                "trained into the ground: give another retrieval.encoder_path"
            )
    return Encoded(
        np.array(places, np.int64).reshape(-1, 3),
        text.astype(np.float16),
        image.astype(np.float16),
        np.array([_hash(w.images[0].sha256) if w.images else 0 for w in windows], np.uint64),
        np.array([_hash(w.id) for w in windows], np.uint64),
        # A document of no cluster is one of its own.
        np.array([_hash(str(w.meta.get("cluster", f"id {w.id}"))) for w in windows], np.uint64),
        np.zeros(len(windows), bool) if block is None else block.blocked(contents),
        queries.astype(np.float16),
    )


def combine(text: np.ndarray, image: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Document vectors (n, d) float32: each part centered, normalized, averaged over those there are, normalized.

    text, image: (n, d) with zeros where there is none; means: (2, d) float32, subtracted from them.
    """
    total = np.zeros(text.shape, np.float32)
    for part, mean in zip((text, image), means, strict=True):
        total += center(part, mean)
    return unit(total)


def center(part: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(n, d) float32 of unit norm: text or image vectors less their mean; zeros stay zeros."""
    is_there = part.any(axis=1, keepdims=True)
    return np.where(is_there, unit(part.astype(np.float32) - mean), 0.0)


def mean_vectors(parts: Iterable[Encoded], dimension: int) -> np.ndarray:
    """(2, d) float32: mean text and mean image vector over the windows that have them, shrunk a little."""
    total, number = np.zeros((2, dimension)), np.zeros((2, 1))
    for part in parts:
        for channel, vectors in enumerate((part.text, part.image)):
            total[channel] += vectors.sum(axis=0, dtype=np.float64)
            number[channel] += np.count_nonzero(vectors.any(axis=1))
    return (total / (number + MEAN_PRIOR)).astype(np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Divide by the norm along the last axis; zeros stay zeros."""
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norm > 0, norm, 1.0)


def _hash(text: str) -> int:
    """64 bits of SHA-256, never 0."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big") or 1


def decoded(window: Document, size: int) -> np.ndarray:
    """The picture of a window, (size, size, 3) uint8. Raises UserError where it is damaged."""
    try:
        return decode_square(window.images[0].data, size)
    except BadImage as error:
        raise UserError(f"a picture of document {window.id} is damaged ({error}); write the shards again") from error


def _drop_words(text: str, share: float, seed: int, id: str) -> str:
    if share == 0.0:
        return text
    words = text.split()
    kept = random_stream("query dropout", seed, id).random(len(words)) >= share
    return " ".join(word for word, keep in zip(words, kept, strict=True) if keep) if kept.any() else text

"""Corpora in, documents out: interleaved text and encoded pictures with their ground truth and source.

In: a `CorpusConfig`. Out: a `Reading`, an iterable of `Document` that counts and names what it left out.
It must never drop data in silence, decode with anything but the three allowed picture formats, nor follow
a path out of the user's folder.
"""

from mmtrain.documents.document import Document, Image
from mmtrain.documents.images import BadImage, decode_square, encode_png, image_from_bytes
from mmtrain.documents.reading import Reading
from mmtrain.documents.registry import CORPORA, read_corpus

__all__ = [
    "CORPORA",
    "BadImage",
    "Document",
    "Image",
    "Reading",
    "decode_square",
    "encode_png",
    "image_from_bytes",
    "read_corpus",
]

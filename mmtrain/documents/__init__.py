"""Corpora in, documents out: interleaved text and encoded pictures with their ground truth and source.

In: a `CorpusConfig`. Out: a `Corpus`, whose partitions give `Document`s, and an `Account` that counts and names what
they left out. It must never drop data in silence, decode with anything but the three allowed picture formats, nor
follow a path out of the user's folder.
"""

from mmtrain.documents.corpus import Account, Corpus, Partition, judge
from mmtrain.documents.document import Document, Image
from mmtrain.documents.images import BadImage, decode_square, encode_png, image_from_bytes
from mmtrain.documents.registry import CORPORA, open_corpus, read_corpus

__all__ = [
    "CORPORA",
    "Account",
    "BadImage",
    "Corpus",
    "Document",
    "Image",
    "Partition",
    "decode_square",
    "encode_png",
    "image_from_bytes",
    "judge",
    "open_corpus",
    "read_corpus",
]

"""Neighbours of documents: encoders, exact search, the artifact, selection.

In: document shards (a memory and queries) and a seed. Out: the neighbours of every query document as indices
into the memory, and `Memory` to search with a text or a picture while generating.
It must never return a document as its own neighbour, nor draw from anything but the keys it is given.
"""

from mmtrain.retrieval.build import build_neighbours
from mmtrain.retrieval.encode import encode_document
from mmtrain.retrieval.neighbours import Memory, Neighbours
from mmtrain.retrieval.selection import select

__all__ = ["Memory", "Neighbours", "build_neighbours", "encode_document", "select"]

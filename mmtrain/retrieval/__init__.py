"""Neighbours of documents: encoders, the index, the artifact of candidates, selection.

In: document shards by split (`train` is the memory) and a seed. Out: candidates of every document as windows of the
memory, which of them a training sequence gets, and `Memory` to search with a text or a picture while generating.
It must never return a document as its own neighbour, nor draw from anything but the keys it is given.
"""

from mmtrain.retrieval.build import build_neighbours
from mmtrain.retrieval.encode import CHANNELS, IMAGE, TEXT
from mmtrain.retrieval.encoders import Encoder, open_encoder
from mmtrain.retrieval.memory import Memory
from mmtrain.retrieval.neighbours import Hit, Neighbours
from mmtrain.retrieval.selection import select, split_parts
from mmtrain.retrieval.windows import window_document, window_tokens, windows_of

__all__ = [
    "CHANNELS",
    "IMAGE",
    "TEXT",
    "Encoder",
    "Hit",
    "Memory",
    "Neighbours",
    "build_neighbours",
    "open_encoder",
    "select",
    "split_parts",
    "window_document",
    "window_tokens",
    "windows_of",
]

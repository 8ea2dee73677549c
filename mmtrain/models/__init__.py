"""Decoder families: a batch of token ids goes in, losses by modality (training) or logits (sampling) come out.

Models know nothing of files, processes or optimizers. A new family is one file and one line in `FAMILIES`.
"""

from mmtrain.models.cache import KVCache
from mmtrain.models.decoder import Decoder
from mmtrain.models.loss import LossSums
from mmtrain.models.packing import Packing, check_attention, document_mask, document_starts, pack_documents
from mmtrain.models.registry import FAMILIES, build_model, count_parameters, num_positions, shapes_only

__all__ = [
    "FAMILIES",
    "Decoder",
    "KVCache",
    "LossSums",
    "Packing",
    "build_model",
    "check_attention",
    "count_parameters",
    "document_mask",
    "document_starts",
    "num_positions",
    "pack_documents",
    "shapes_only",
]

"""From a document to a training sequence.

In: token ids of a query document and of its retrieved documents, the vocabulary, a keyed generator.
Out: a `TrainingSequence` (ids, loss weights), or the prompt that generation starts from.
It must never draw from a global generator, lose or double a token, or read a file: the same key gives
the same sequence in every process.
"""

from mmtrain.objective.assemble import arrange, assemble
from mmtrain.objective.causal import causal
from mmtrain.objective.cells import NO_CELL, picture_cells
from mmtrain.objective.cm3 import cm3, rotate, unrotate
from mmtrain.objective.prompts import (
    caption_prompt,
    infill_prompt,
    pair,
    text_to_image_prompt,
    unconditional_image_prompt,
)
from mmtrain.objective.sequence import TrainingSequence
from mmtrain.objective.training import training_sequences

__all__ = [
    "NO_CELL",
    "TrainingSequence",
    "arrange",
    "assemble",
    "caption_prompt",
    "causal",
    "cm3",
    "infill_prompt",
    "pair",
    "picture_cells",
    "rotate",
    "text_to_image_prompt",
    "training_sequences",
    "unconditional_image_prompt",
    "unrotate",
]

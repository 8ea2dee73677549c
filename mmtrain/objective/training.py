"""One document and its neighbours in, its training sequences out: one, or several where the document is long."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mmtrain.config import ObjectiveConfig
from mmtrain.objective.assemble import arrange, assemble, fit_retrieved, split_windows
from mmtrain.objective.causal import causal
from mmtrain.objective.cm3 import TOKENS_PER_MASK, cm3, draw_num_masks
from mmtrain.objective.sequence import TrainingSequence
from mmtrain.tokens import Vocabulary


def training_sequences(
    query: np.ndarray,
    retrieved: Sequence[np.ndarray],
    vocabulary: Vocabulary,
    config: ObjectiveConfig,
    rng: np.random.Generator,
    max_length: int,
    max_retrieved: int = 0,
) -> list[TrainingSequence]:
    """Assemble the documents and apply the objective; a pure function of the arguments and the state of `rng`.

    query, each of retrieved: (n,) ids of one document. max_length: most ids of a sequence; a longer query is split
    into windows (`split_windows`), each with the retrieved documents that fit beside it. To fit, retrieved documents
    go first, then masks. max_retrieved: most ids of retrieved documents (0: what fits).
    Raises UserError for a picture longer than a sequence.
    """
    limit = max_length - 2  # the two <eos>
    windows = split_windows(arrange(query, vocabulary, config.order, rng), vocabulary, limit)
    documents = [arrange(document, vocabulary, config.order, rng) for document in retrieved]
    sequences = []
    for number, window in enumerate(windows):
        num_masks = draw_num_masks(config, rng) if config.kind == "cm3" else 0
        num_masks = min(num_masks, (limit - len(window)) // TOKENS_PER_MASK)
        room = limit - len(window) - TOKENS_PER_MASK * num_masks
        fitting = fit_retrieved(documents, min(room, max_retrieved or room))
        tokens, num_retrieved = assemble(window, fitting, vocabulary)
        if config.kind == "cm3":
            sequence = cm3(tokens, num_retrieved, vocabulary, config, rng, num_masks)
        else:
            sequence = causal(tokens, num_retrieved, vocabulary, config)
        dropped = len(documents) - len(fitting)
        if dropped or len(windows) > 1:
            sequence = replace(sequence, window=number, num_windows=len(windows), dropped_retrieved=dropped)
        sequences.append(sequence)
    return sequences

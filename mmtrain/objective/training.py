"""One document and its neighbours in, one training sequence out."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mmtrain.config import ObjectiveConfig
from mmtrain.objective.assemble import arrange, assemble, fit_query, fit_retrieved
from mmtrain.objective.causal import causal
from mmtrain.objective.cm3 import TOKENS_PER_MASK, cm3, draw_num_masks
from mmtrain.objective.sequence import TrainingSequence
from mmtrain.tokens import Vocabulary


def training_sequence(
    query: np.ndarray,
    retrieved: Sequence[np.ndarray],
    vocabulary: Vocabulary,
    config: ObjectiveConfig,
    rng: np.random.Generator,
    max_length: int | None = None,
) -> TrainingSequence:
    """Assemble the documents and apply the objective; a pure function of the arguments and the state of `rng`.

    query, each of retrieved: (n,) ids of one document. max_length: most ids of the result. To fit, retrieved
    documents go first, then masks, then whole trailing segments of the query, and the result says so.
    Raises UserError when not even the query's first picture fits.
    """
    query = arrange(query, vocabulary, config.order, rng)
    documents = [arrange(document, vocabulary, config.order, rng) for document in retrieved]
    num_masks = draw_num_masks(config, rng) if config.kind == "cm3" else 0
    truncated = False
    if max_length is not None:
        limit = max_length - 2  # the two <eos>
        fitting = fit_query(query, vocabulary, limit)
        truncated, query = len(fitting) < len(query), fitting
        num_masks = min(num_masks, (limit - len(query)) // TOKENS_PER_MASK)
        documents = fit_retrieved(documents, limit - len(query) - TOKENS_PER_MASK * num_masks)
    tokens, num_retrieved = assemble(query, documents, vocabulary)
    if config.kind == "cm3":
        sequence = cm3(tokens, num_retrieved, vocabulary, config, rng, num_masks)
    else:
        sequence = causal(tokens, num_retrieved, vocabulary, config)
    dropped = len(retrieved) - len(documents)
    return replace(sequence, truncated=truncated, dropped_retrieved=dropped) if truncated or dropped else sequence

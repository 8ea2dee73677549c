"""Plain next-token prediction: the assembled sequence as it is."""

import numpy as np

from mmtrain.config import ObjectiveConfig
from mmtrain.objective.cells import picture_cells
from mmtrain.objective.sequence import TrainingSequence, mark_retrieved, target_weights
from mmtrain.tokens import Vocabulary


def causal(tokens: np.ndarray, num_retrieved: int, vocabulary: Vocabulary, config: ObjectiveConfig) -> TrainingSequence:
    """The training sequence without masks. tokens, num_retrieved: as `assemble` returns them."""
    is_retrieved = mark_retrieved(len(tokens), num_retrieved)
    weight = target_weights(tokens, is_retrieved, vocabulary, config)
    return TrainingSequence(tokens, weight, is_retrieved, picture_cells(tokens, vocabulary))

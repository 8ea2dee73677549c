"""The training sequence of a document that fits one."""

import numpy as np

from mmtrain.config import ObjectiveConfig
from mmtrain.objective import TrainingSequence, training_sequences
from mmtrain.tokens import Vocabulary


def training_sequence(
    query: np.ndarray,
    retrieved: list[np.ndarray],
    vocabulary: Vocabulary,
    config: ObjectiveConfig,
    rng: np.random.Generator,
    max_length: int = 1000,
) -> TrainingSequence:
    (sequence,) = training_sequences(query, retrieved, vocabulary, config, rng, max_length)
    return sequence

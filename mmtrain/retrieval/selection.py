"""Which of a document's neighbours a training sequence gets."""

import numpy as np

from mmtrain.config import RetrievalConfig
from mmtrain.config.randomness import random_stream


def select(candidates: np.ndarray, key: tuple[int | str, ...], config: RetrievalConfig) -> list[int]:
    """Draw retrieved documents among the candidates, in random order; a pure function of its arguments.

    candidates: (k,) memory indices, -1 for none. key: for example (seed, source, epoch, document index). As many as
    `policy` says (fewer where there are fewer candidates), none with probability `dropout`.
    """
    usable = candidates[candidates >= 0]
    if len(usable) == 0 or config.num_documents == 0:
        return []
    stream = random_stream("select", *key)
    # All draws are made whatever they decide, so that changing dropout leaves the other choices as they are.
    is_dropped = stream.random() < config.dropout
    uniform = int(stream.integers(config.num_documents + 1))
    order = stream.permutation(len(usable))
    if is_dropped:
        return []
    wanted = config.num_documents if config.policy == "fixed" else uniform
    return usable[order[:wanted]].tolist()

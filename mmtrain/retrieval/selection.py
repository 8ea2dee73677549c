"""Which of a document's candidates a training sequence gets, and in which order."""

import numpy as np

from mmtrain.config import RetrievalConfig
from mmtrain.config.randomness import random_stream


def select(num_candidates: int, key: tuple[int | str, ...], config: RetrievalConfig) -> list[int]:
    """Draw retrieved documents among the candidates: their places in the list of candidates, which is best first.

    A pure function of its arguments. key: for example (seed, source, epoch, document index). As many as `policy` says
    (fewer where there are fewer candidates), none with probability `dropout`, in the order of `order`.
    """
    if num_candidates == 0 or config.num_documents == 0:
        return []
    stream = random_stream("select", *key)
    # All draws are made whatever they decide, so that changing dropout leaves the other choices as they are.
    is_dropped = stream.random() < config.dropout
    uniform = int(stream.integers(config.num_documents + 1))
    drawn = stream.permutation(num_candidates)
    if is_dropped:
        return []
    wanted = config.num_documents if config.policy == "fixed" else uniform
    chosen = drawn[:wanted].tolist()
    if config.order == "random":
        return chosen
    return sorted(chosen, reverse=config.order == "best_last")


def split_parts(tokens: np.ndarray, eos: int) -> list[np.ndarray]:
    """The candidates of a document of inlined shards: `R1 <eos> R2 <eos> ...` without the `<eos>`, as views."""
    ends = np.flatnonzero(tokens == eos)
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64) if len(ends) else ends
    return [tokens[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

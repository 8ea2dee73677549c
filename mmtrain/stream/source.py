"""A source: documents of one data set in a new order every epoch, as training sequences."""

from dataclasses import dataclass

import numpy as np

from mmtrain.config import ObjectiveConfig, RetrievalConfig, UserError
from mmtrain.config.randomness import random_stream
from mmtrain.objective import TrainingSequence, training_sequence
from mmtrain.retrieval import Neighbours, select
from mmtrain.shards import TokenShards
from mmtrain.stream.order import permute


@dataclass(frozen=True)
class Source:
    """Token documents with a name and a weight in the mixture, and perhaps neighbours in a memory.

    name: identifies the source in the state of the stream; it also keys the random choices. weight: share of
    the tokens. neighbours: one row of indices into `memory` per document of `tokens`.
    """

    name: str
    tokens: TokenShards
    weight: float = 1.0
    neighbours: Neighbours | None = None
    memory: TokenShards | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) == 0:
            raise UserError(f"source {self.name} has no documents; prepare its data or leave it out")
        if not self.weight > 0:
            raise UserError(f"source {self.name} has weight {self.weight}; give a number above 0 or leave it out")
        if self.neighbours is None:
            return
        if self.memory is None:
            raise UserError(f"source {self.name} has neighbours but no memory to take them from")
        if len(self.neighbours) != len(self.tokens):
            raise UserError(
                f"source {self.name} has {len(self.tokens)} documents but neighbours of {len(self.neighbours)}; "
                "build the neighbours again"
            )
        for role, shards in (("queries", self.tokens), ("memory", self.memory)):
            ends = [shards.id(0), shards.id(len(shards) - 1)] if len(shards) else []
            if ends != self.neighbours.facts[role]["first_and_last_id"]:
                raise UserError(f"the neighbours of source {self.name} belong to other documents; build them again")
        if self.memory.vocabulary != self.tokens.vocabulary:
            raise UserError(f"source {self.name} and its memory have different vocabularies; tokenize them together")


@dataclass(frozen=True)
class Recipe:
    """How a document of any source becomes a training sequence: all that does not change while a run lives."""

    objective: ObjectiveConfig
    retrieval: RetrievalConfig | None
    max_length: int
    seed: int

    def places(self, source: Source, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and document index at global positions of a source; positions run on through all epochs.

        position: (k,) int64. Returns two (k,) int64.
        """
        n = len(source.tokens)
        epoch, within = np.divmod(position, n)
        order_seed = int(random_stream("order", self.seed, source.name).integers(1 << 62))
        return epoch, permute(within, n, order_seed, epoch)

    def sequence(self, source: Source, epoch: int, index: int) -> TrainingSequence:
        """The training sequence of one document in one epoch, a pure function of the arguments."""
        key = (self.seed, source.name, epoch, index)
        retrieved: list[np.ndarray] = []
        if self.retrieval and self.retrieval.enabled and source.neighbours is not None and source.memory is not None:
            chosen = select(source.neighbours.candidates(index), key, self.retrieval)
            retrieved = [source.memory.tokens(i) for i in chosen]
        return training_sequence(
            source.tokens.tokens(index),
            retrieved,
            source.tokens.vocabulary,
            self.objective,
            random_stream("objective", *key),
            self.max_length,
        )

"""A source: documents of one data set in a new order every epoch, as training sequences."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mmtrain.config import ObjectiveConfig, RetrievalConfig, UserError
from mmtrain.config.randomness import random_stream
from mmtrain.objective import TrainingSequence, training_sequences
from mmtrain.retrieval import Neighbours, select
from mmtrain.shards import TokenShards
from mmtrain.stream.mixture import share_at
from mmtrain.stream.order import Order


@dataclass(frozen=True)
class Source:
    """Token documents with a name and a weight in the mixture, and perhaps neighbours in a memory.

    name: identifies the source in the state of the stream; it also keys the random choices. weight: share of
    the tokens, or shares by step, {step: share}, linear in between. neighbours: one row of indices into `memory` per
    document of `tokens`.
    """

    name: str
    tokens: TokenShards
    weight: float | Mapping[int, float] = 1.0
    neighbours: Neighbours | None = None
    memory: TokenShards | None = None
    schedule: Mapping[int, float] = field(init=False)

    def __post_init__(self) -> None:
        schedule = dict(self.weight) if isinstance(self.weight, Mapping) else {0: self.weight}
        object.__setattr__(self, "schedule", schedule)
        if len(self.tokens) == 0:
            raise UserError(f"source {self.name} has no documents; prepare its data or leave it out")
        if not (schedule and min(schedule.values()) >= 0 and 0 < max(schedule.values()) < float("inf")):
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

    def share(self, step: int) -> float:
        """Weight in the mixture at a step."""
        return share_at(self.schedule, step)


@dataclass(frozen=True)
class Recipe:
    """How a document of any source becomes training sequences: all that does not change while a run lives."""

    objective: ObjectiveConfig
    retrieval: RetrievalConfig | None
    max_length: int
    seed: int

    def order(self, source: Source, shuffle_shards: int = 0) -> Order:
        """The order of a source's documents."""
        seed = int(random_stream("order", self.seed, source.name).integers(1 << 62))
        return Order([shard.documents for shard in source.tokens.manifest.shards], seed, shuffle_shards)

    def sequences(self, source: Source, epoch: int, index: int) -> list[TrainingSequence]:
        """The training sequences of one document in one epoch, a pure function of the arguments."""
        key = (self.seed, source.name, epoch, index)
        retrieved: list[np.ndarray] = []
        if self.retrieval and self.retrieval.enabled and source.neighbours is not None and source.memory is not None:
            chosen = select(source.neighbours.candidates(index), key, self.retrieval)
            retrieved = [source.memory.tokens(i) for i in chosen]
        return training_sequences(
            source.tokens.tokens(index),
            retrieved,
            source.tokens.vocabulary,
            self.objective,
            random_stream("objective", *key),
            self.max_length,
        )

"""A source: documents of one data set in a new order every epoch, as training sequences."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from mmtrain.config import ObjectiveConfig, RetrievalConfig, UserError
from mmtrain.config.randomness import random_stream
from mmtrain.objective import TrainingSequence, training_sequences
from mmtrain.retrieval import Neighbours, select, split_parts, window_tokens
from mmtrain.shards import TokenShards
from mmtrain.stream.mixture import share_at
from mmtrain.stream.order import Order


@dataclass(frozen=True)
class Source:
    """Token documents with a name and a weight in the mixture, and perhaps neighbours in a memory.

    name: identifies the source in the state of the stream; it also keys the random choices. weight: share of
    the tokens, or shares by step, {step: share}, linear in between. neighbours: candidates of each document of
    `tokens` among the windows of `memory`. inlined: the tokens of those candidates, document by document, in place of
    both.
    """

    name: str
    tokens: TokenShards
    weight: float | Mapping[int, float] = 1.0
    neighbours: Neighbours | None = None
    memory: TokenShards | None = None
    inlined: TokenShards | None = None
    schedule: Mapping[int, float] = field(init=False)

    def __post_init__(self) -> None:
        schedule = dict(self.weight) if isinstance(self.weight, Mapping) else {0: self.weight}
        object.__setattr__(self, "schedule", schedule)
        if len(self.tokens) == 0:
            raise UserError(f"source {self.name} has no documents; prepare its data or leave it out")
        if not (schedule and min(schedule.values()) >= 0 and 0 < max(schedule.values()) < float("inf")):
            raise UserError(f"source {self.name} has weight {self.weight}; give a number above 0 or leave it out")
        if self.inlined is not None:
            if self.inlined.manifest.fingerprints.get("queries") != self.tokens.manifest.fingerprint:
                raise UserError(f"the inlined shards of source {self.name} belong to other tokens; join them again")
            return
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
            facts, made_of = self.neighbours.facts[role], shards.manifest.fingerprints.get("documents")
            ends = [shards.id(0), shards.id(len(shards) - 1)] if len(shards) else []
            # Token shards of mmtrain 0.1 do not say which documents they were made of.
            if ends != facts["first_and_last_id"] or made_of not in (None, facts["fingerprint"]):
                raise UserError(f"the neighbours of source {self.name} belong to other documents; build them again")
        if self.memory.vocabulary != self.tokens.vocabulary:
            raise UserError(f"source {self.name} and its memory have different vocabularies; tokenize them together")

    def prefetch(self, indices: Iterable[int]) -> None:
        """Fetch what documents need in the background, the first ones first."""
        indices = list(indices)
        self.tokens.prefetch(indices)
        if self.inlined is not None:
            self.inlined.prefetch(indices)

    def retrieved(self, index: int, key: tuple[int | str, ...], config: RetrievalConfig) -> list[np.ndarray]:
        """Token ids of the documents to place before document `index`, in order; `key` as of `select`."""
        if self.inlined is not None:
            parts = split_parts(self.inlined.tokens(index), self.tokens.vocabulary.eos)
            return [parts[place] for place in select(len(parts), key, config)]
        if self.neighbours is None or self.memory is None:
            return []
        candidates = self.neighbours.candidates(index).tolist()
        places = [self.neighbours.place(candidates[place]) for place in select(len(candidates), key, config)]
        return [window_tokens(self.memory, *place) for place in places]

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
        max_retrieved = 0
        if self.retrieval and self.retrieval.enabled:
            retrieved = source.retrieved(index, key, self.retrieval)
            max_retrieved = self.retrieval.max_tokens
        return training_sequences(
            source.tokens.tokens(index),
            retrieved,
            source.tokens.vocabulary,
            self.objective,
            random_stream("objective", *key),
            self.max_length,
            max_retrieved,
        )

"""The stream: `batch(step)` as a pure function of seed and step.

Row j of step s is the global sequence q = s * G + j of the run (G rows per step). It comes from lane q mod L, as
that lane's row number q // L. Lanes know nothing of ranks, so any number of processes sees the same rows.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mmtrain.config import ObjectiveConfig, RetrievalConfig, StreamConfig, UserError
from mmtrain.stream.batch import CACHE, Batch, BatchCounts, collate, origins
from mmtrain.stream.lanes import Lane
from mmtrain.stream.mixture import quotas
from mmtrain.stream.source import Recipe, Source
from mmtrain.tokens import Vocabulary

STATE_FORMAT = 2


class Stream:
    """Batches of a mixture of sources. Safe to use from several threads."""

    def __init__(
        self,
        sources: Sequence[Source],
        vocabulary: Vocabulary,
        config: StreamConfig,
        objective: ObjectiveConfig,
        retrieval: RetrievalConfig | None,
        seed: int,
        with_origin: bool = False,
    ) -> None:
        """with_origin: batches say where their documents are in their sources (`Batch.origin`)."""
        self._sources = {source.name: source for source in sources}
        if not sources or len(self._sources) < len(sources):
            raise UserError(f"a stream needs sources of different names, not {[source.name for source in sources]}")
        for source in sources:
            if source.tokens.vocabulary != vocabulary:
                raise UserError(f"source {source.name} was tokenized with another vocabulary; tokenize it again")
        if objective.kind == "cm3" and objective.num_sentinels > vocabulary.num_sentinels:
            raise UserError(
                f"objective.num_sentinels={objective.num_sentinels}, but the vocabulary has "
                f"{vocabulary.num_sentinels} sentinels; set it to at most that"
            )
        self.vocabulary, self.config, self._seed, self._with_origin = vocabulary, config, seed, with_origin
        self.counts: BatchCounts | None = None
        """What the last batch from `batch` holds."""
        self._last_step = -1
        recipe = Recipe(objective, retrieval, config.sequence_length, seed)
        orders = {source.name: recipe.order(source, config.shuffle_shards) for source in sources}
        # A checkpoint asks for the state a few steps behind the prefetched ones.
        history = (config.prefetch + 5) * -(-config.global_batch // config.lanes) + 2
        self._lanes = [
            Lane(
                index,
                config.lanes,
                self._sources,
                orders,
                partial(self._row_quotas, index),
                recipe,
                config.lookahead,
                history,
            )
            for index in range(config.lanes)
        ]
        self._quotas: tuple[int, dict[str, int]] = (-1, {})
        self._cache_seen = np.zeros((len(sources), len(CACHE)), dtype=np.int64)
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cache_seen = np.zeros_like(self._cache_seen)  # so do the stores in another process
        self._lock = threading.RLock()

    @property
    def sources(self) -> list[Source]:
        """The sources, in the order of the counts."""
        return list(self._sources.values())

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Rows rank, rank + world, ... of the global batch of `step`; `counts` then says what they hold."""
        batch, self.counts = self.prepare(step, rank, world)
        return batch

    def prepare(self, step: int, rank: int = 0, world: int = 1) -> tuple[Batch, BatchCounts]:
        """As `batch`, with the counts returned beside it (for other threads).

        Ascending steps cost the least; any other step is replayed from the nearest state known.
        """
        rows_per_step = self.config.global_batch
        if not 0 <= rank < world <= rows_per_step:
            raise UserError(
                f"stream.global_batch={rows_per_step} rows cannot be shared by {world} processes (rank {rank}); "
                "set a global batch of at least one row per process"
            )
        started = time.perf_counter()
        rows, sources, origin = [], [], []
        taken = np.zeros(len(self._sources), dtype=np.int64)
        numbers = {name: number for number, name in enumerate(self._sources)}
        with self._lock:
            for j in range(rank, rows_per_step, world):
                number, lane = divmod(step * rows_per_step + j, self.config.lanes)
                packed, state = self._lanes[lane].row(number)
                rows.append([entry.sequence for entry in packed])
                sources.append([numbers[entry.source] for entry in packed])
                if self._with_origin:
                    origin.append([(e.sequence, numbers[e.source], e.epoch, e.index) for e in packed])
                taken += [state.taken[name] for name in numbers]
            self._last_step = step
        batch, counts = collate(rows, sources, len(numbers), self.config.sequence_length, self.vocabulary)
        if self._with_origin:
            batch["origin"] = origins(origin, self.config.sequence_length)
        counts.by_source[:, -1] = taken
        counts.by_source[:, -1 - len(CACHE) : -1] = self._cache_counts()
        return batch, replace(counts, seconds=time.perf_counter() - started)

    def _cache_counts(self) -> np.ndarray:
        """(sources, len(CACHE)) int64: what the stores did since the last call."""
        with self._lock:
            counts = [source.tokens.store.counts for source in self._sources.values()]
            now = np.array([(c.hits, c.misses, c.bytes_downloaded) for c in counts], dtype=np.int64)
            since, self._cache_seen = now - self._cache_seen, now
        return since

    def _row_quotas(self, lane: int, row: int) -> Mapping[str, int]:
        """Credit of the sources per token drawn for a row of a lane, by the shares at the step that the row is in."""
        step = (lane + row * self.config.lanes) // self.config.global_batch
        if self._quotas[0] != step:
            shares = {name: source.share(step) for name, source in self._sources.items()}
            if not any(shares.values()):
                raise UserError(f"at step {step} no source has a share above 0; change the weights of the mix")
            self._quotas = step, quotas(shares)
        return self._quotas[1]

    def state(self, step: int | None = None, rank: int = 0, world: int = 1) -> dict[str, Any]:
        """The stream after `step` (default: after the last batch produced), JSON-able, the same for any world size.

        With `world` > 1 it holds only the lanes whose number is `rank` modulo `world`, to be put together with
        `merge_states`; where world divides both global_batch and lanes these are the lanes that the rank reads
        anyway. With the defaults all lanes advance to the step, which replays those that other ranks read.
        """
        with self._lock:
            step = self._last_step if step is None else step
            end = (step + 1) * self.config.global_batch
            num_lanes = self.config.lanes
            lanes = {}
            for index in range(rank, num_lanes, world):
                rows = max(0, -(-(end - index) // num_lanes))
                lanes[str(index)] = self._lanes[index].state(rows).plain()
        sources = {name: _identity_of(source) for name, source in self._sources.items()}
        return {**self._identity(), "step": step, "sources": sources, "lane_states": lanes}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of any world size: the next batch is `batch(state["step"] + 1)`.

        New sources and other weights are legal. Raises UserError where the state belongs to another stream.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UserError(
                    f"the checkpoint's stream has {name} {state.get(name)}, this run {value}; "
                    "restore the old value or start a new run"
                )
        saved, lanes = state["sources"], state["lane_states"]
        for name, facts in saved.items():
            if name not in self._sources:
                raise UserError(f"the checkpoint's stream reads source {name}, which this run does not have; add it")
            now = _identity_of(self._sources[name])
            if facts != now:
                raise UserError(
                    f"source {name} was {facts} when the checkpoint was written and is {now} now; bring the old "
                    "documents back, and add new ones as a source of their own"
                )
        missing = {str(i) for i in range(self.config.lanes)} - lanes.keys()
        if missing:
            raise UserError(f"the checkpoint's stream state lacks {len(missing)} lanes; it is a part of one rank only")
        with self._lock:
            for index, lane in enumerate(self._lanes):
                lane.load(lanes[str(index)])
            self._last_step = int(state["step"])

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a state to mean the same rows."""
        c = self.config
        return {
            "format": STATE_FORMAT,
            "seed": self._seed,
            "lanes": c.lanes,
            "global_batch": c.global_batch,
            "sequence_length": c.sequence_length,
            "shuffle_shards": c.shuffle_shards,
            "vocabulary": self.vocabulary.fingerprint,
        }


def _identity_of(source: Source) -> dict[str, Any]:
    """What tells that a source holds the documents that it held."""
    return {"documents": len(source.tokens), "fingerprint": source.tokens.manifest.fingerprint}


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put the states of all ranks after the same step together into the state of the whole stream."""
    if len({state["step"] for state in states}) != 1:
        raise ValueError(f"states of different steps: {[state['step'] for state in states]}")
    lanes = {index: lane for state in states for index, lane in state["lane_states"].items()}
    return {**states[0], "lane_states": dict(sorted(lanes.items(), key=lambda entry: int(entry[0])))}

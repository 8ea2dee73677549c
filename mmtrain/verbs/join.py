"""The join: tokens of the candidates beside each document, for clusters that stream from an object store.

A look-up reads documents at random from the shards of the memory; inlined shards are read in the order of the
documents themselves. Document i of an inlined shard is `R1 <eos> R2 <eos> ...`: all candidates of document i of the
token shards, best first. Training draws among them as it does by look-up, so that both give the same batches.
"""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np

from mmtrain.config import Config
from mmtrain.retrieval import Neighbours, window_tokens
from mmtrain.shards import ShardInfo, TokenShards, finish_tokens, seal, write_token_shard
from mmtrain.tokens import TokenDocument
from mmtrain.verbs.build import SPLITS
from mmtrain.verbs.partitions import Result, Task, run_partitions


@dataclass(frozen=True)
class JoinRange:
    """Work: the candidates of documents first to stop (exclusive) of a split, in an inlined shard."""

    tokens: Path
    neighbours: Path
    out: Path

    def __call__(self, task: Task) -> Result:
        split = task["split"]
        queries, memory = _open_tokens(self.tokens / split), _open_tokens(self.tokens / "train")
        neighbours = _open_neighbours(self.neighbours / split)
        eos = np.array([memory.vocabulary.eos], memory.vocabulary.dtype)

        def joined() -> Iterator[TokenDocument]:
            for i in range(task["first"], task["stop"]):
                parts = [np.empty(0, eos.dtype)]
                for number in neighbours.candidates(i).tolist():
                    parts += [window_tokens(memory, *neighbours.place(number)), eos]
                yield TokenDocument(queries.id(i), np.concatenate(parts), (), {})

        return asdict(write_token_shard(self.out / split, task["number"], joined(), memory.vocabulary))


def join_retrieved(config: Config, tokens: Path, neighbours: Path, out: Path) -> None:
    """Fill `out` (perhaps an interrupted join of the same) with train/ and validation/: one inlined shard per shard.

    tokens, neighbours: of one source, with both splits. Raises UserError for shards that do not belong together.
    """
    tokens, neighbours, out = tokens.resolve(), neighbours.resolve(), out.resolve()
    tasks: list[Task] = []
    for split in SPLITS:
        (out / split).mkdir(exist_ok=True)
        ends = [0, *accumulate(shard.documents for shard in TokenShards(tokens / split).manifest.shards)]
        tasks += [
            {"split": split, "number": number, "first": first, "stop": stop}
            for number, (first, stop) in enumerate(zip(ends, ends[1:], strict=False))
        ]
    join = JoinRange(tokens, neighbours, out)
    label, processes = f"joining {tokens.parent.name}", config.data.processes
    results = run_partitions(join, tasks, out / ".work", label, processes, runner=config.runner)
    for split in SPLITS:
        shards = [ShardInfo(**result) for result, task in zip(results, tasks, strict=True) if task["split"] == split]
        made_by = TokenShards(tokens / split).manifest
        finish_tokens(
            out / split,
            shards,
            _open_tokens(tokens / split).vocabulary,
            made_by.fingerprints["text"],
            made_by.fingerprints["image"],
            {"queries": made_by.fingerprint, "memory": TokenShards(tokens / "train").manifest.fingerprint},
        )
    seal(out)
    shutil.rmtree(out / ".work")


@lru_cache(maxsize=4)
def _open_tokens(folder: Path) -> TokenShards:
    return TokenShards(folder)


@lru_cache(maxsize=2)
def _open_neighbours(folder: Path) -> Neighbours:
    return Neighbours(folder)

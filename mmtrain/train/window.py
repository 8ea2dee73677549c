"""What happened since the last log row, summed on the device and over ranks without a wait in between."""

import time
from dataclasses import dataclass, field

import numpy as np
import torch

from mmtrain.flops import TOKEN_KINDS, StepFlops
from mmtrain.models import LossSums
from mmtrain.stream import COLUMNS, BatchCounts
from mmtrain.tokens import MODALITIES
from mmtrain.train.distributed import World
from mmtrain.train.learner import Learner


@dataclass(frozen=True)
class Totals:
    """Sums over all ranks of one window."""

    steps: int
    rows: int
    seconds: float
    data_seconds: float
    cross_entropy: dict[str, tuple[float, float]]
    tokens: dict[str, int]
    padding: int
    prepare_seconds: float
    by_source: dict[str, dict[str, int]]
    """What was delivered of each source, by the names of `stream.COLUMNS`."""
    flops: StepFlops
    flops_by_kind: dict[str, int]
    """Those of the model, by kind of token."""

    def delivered(self, column: str) -> int:
        """One of `stream.COLUMNS` summed over the sources."""
        return sum(row[column] for row in self.by_source.values())

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(self.tokens.values())

    def losses(self, prefix: str = "") -> dict[str, float | None]:
        """Mean cross entropy in nats, over all targets and by modality (None without targets)."""
        total = sum(s for s, _ in self.cross_entropy.values())
        count = sum(n for _, n in self.cross_entropy.values())
        row: dict[str, float | None] = {f"{prefix}loss": total / count if count else None}
        for name, (s, n) in self.cross_entropy.items():
            row[f"{prefix}loss_{name}"] = s / n if n else None
        return row


@dataclass
class Window:
    """Accumulates between two log rows; `reduce` is the only place that waits for the device."""

    world: World
    learner: Learner
    row_length: int
    sources: tuple[str, ...]
    cross_entropy: torch.Tensor = field(init=False)
    counts: np.ndarray = field(init=False)
    by_source: np.ndarray = field(init=False)
    steps: int = field(init=False)
    started: float = field(init=False)
    data_seconds: float = field(init=False)
    prepare_seconds: float = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self.cross_entropy = torch.zeros(len(MODALITIES), 2, dtype=torch.float64, device=self.world.device)
        self.counts = np.zeros(1 + self.learner.num_sums, dtype=np.int64)
        self.by_source = np.zeros((len(self.sources), len(COLUMNS)), dtype=np.int64)
        self.steps, self.data_seconds, self.prepare_seconds, self.started = 0, 0.0, 0.0, time.perf_counter()

    def add_loss(self, sums: LossSums) -> None:
        """Add the loss sums of a micro-batch; stays on the device."""
        self.cross_entropy += sums.by_modality

    def add_work(self, sums: np.ndarray) -> None:
        """Add the sums of `Learner.inputs` of this rank's share of a step."""
        self.counts[1:] += sums

    def add_step(self, counts: BatchCounts, data_seconds: float = 0.0) -> None:
        """Add the counts of this rank's share of a step; data_seconds: how long training waited for it."""
        self.counts[0] += counts.rows
        self.by_source += counts.by_source
        self.data_seconds += data_seconds
        self.prepare_seconds += counts.seconds
        self.steps += 1

    def reduce(self) -> Totals:
        """Sum over ranks and reset."""
        self.world.sum(self.cross_entropy)
        own = np.concatenate([self.counts, self.by_source.reshape(-1)])
        (rows, *sums), flat = np.split(
            self.world.sum(torch.as_tensor(own, device=self.world.device)).cpu().numpy(), [len(self.counts)]
        )
        table = [dict(zip(COLUMNS, row, strict=True)) for row in flat.reshape(self.by_source.shape).tolist()]
        by_source = dict(zip(self.sources, table, strict=True))
        tokens = {kind: sum(row[kind] for row in table) for kind in TOKEN_KINDS}
        rows = int(rows)
        flops, flops_by_kind = self.learner.flops(np.array(sums), tokens, rows)
        pairs = self.cross_entropy.tolist()
        totals = Totals(
            steps=self.steps,
            seconds=time.perf_counter() - self.started,
            data_seconds=self.data_seconds,
            cross_entropy={name: (pair[0], pair[1]) for name, pair in zip(MODALITIES, pairs, strict=True)},
            tokens=tokens,
            padding=rows * self.row_length - sum(tokens.values()),
            rows=rows,
            prepare_seconds=self.prepare_seconds,
            by_source=by_source,
            flops=flops,
            flops_by_kind=flops_by_kind,
        )
        self.reset()
        return totals

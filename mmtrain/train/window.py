"""What happened since the last log row, summed on the device and over ranks without a wait in between."""

import time
from dataclasses import dataclass, field

import numpy as np
import torch

from mmtrain.config import ModelConfig
from mmtrain.flops import TOKEN_KINDS, StepFlops, flops_from_sums
from mmtrain.models import LossSums
from mmtrain.stream import BatchCounts
from mmtrain.tokens import MODALITIES
from mmtrain.train.distributed import World


@dataclass(frozen=True)
class Totals:
    """Sums over all ranks of one window."""

    steps: int
    seconds: float
    data_seconds: float
    cross_entropy: dict[str, tuple[float, float]]
    tokens: dict[str, int]
    padding: int
    truncated: int
    dropped_retrieved: int
    flops: StepFlops

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
    model: ModelConfig
    vocabulary_size: int
    row_length: int
    micro_rows: int
    cross_entropy: torch.Tensor = field(init=False)
    counts: np.ndarray = field(init=False)
    steps: int = field(init=False)
    started: float = field(init=False)
    data_seconds: float = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self.cross_entropy = torch.zeros(len(MODALITIES), 2, dtype=torch.float64, device=self.world.device)
        self.counts = np.zeros(len(TOKEN_KINDS) + 5, dtype=np.int64)
        self.steps, self.data_seconds, self.started = 0, 0.0, time.perf_counter()

    def add_loss(self, sums: LossSums) -> None:
        """Add the loss sums of a micro-batch; stays on the device."""
        self.cross_entropy += sums.by_modality

    def add_step(self, counts: BatchCounts, rows: int, data_seconds: float = 0.0) -> None:
        """Add the counts of this rank's share of a step, which has `rows` rows."""
        kinds = [counts.tokens[kind] for kind in TOKEN_KINDS]
        squares = np.square(counts.lengths).sum()
        scores = rows * self.row_length**2
        if self.world.device.type == "cpu":  # as models.pack_documents decides (for the whole share of the rank)
            scores = min(scores, counts.documents * int(counts.lengths.max(initial=0)) ** 2)
        self.counts += np.array([*kinds, squares, scores, rows, counts.truncated, counts.dropped_retrieved])
        self.data_seconds += data_seconds
        self.steps += 1

    def reduce(self) -> Totals:
        """Sum over ranks and reset."""
        self.world.sum(self.cross_entropy)
        integers = self.world.sum(torch.as_tensor(self.counts, device=self.world.device))
        *kinds, squares, scores, rows, truncated, dropped = integers.tolist()
        num_tokens = sum(kinds)
        micro_tokens = self.micro_rows * self.row_length
        flops = flops_from_sums(
            self.model,
            self.vocabulary_size,
            num_tokens,
            squares,
            rows,
            self.row_length,
            micro_tokens=micro_tokens,
            computed_squares=scores,
        )
        pairs = self.cross_entropy.tolist()
        totals = Totals(
            steps=self.steps,
            seconds=time.perf_counter() - self.started,
            data_seconds=self.data_seconds,
            cross_entropy={name: (pair[0], pair[1]) for name, pair in zip(MODALITIES, pairs, strict=True)},
            tokens=dict(zip(TOKEN_KINDS, kinds, strict=True)),
            padding=rows * self.row_length - num_tokens,
            truncated=truncated,
            dropped_retrieved=dropped,
            flops=flops,
        )
        self.reset()
        return totals

"""A run of the real loop in this process, engine=ddp in float32 on the CPU, over batches that no other code decides."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from mmtrain.config import Config, StreamConfig
from mmtrain.config.randomness import random_stream
from mmtrain.flops import Ledger
from mmtrain.models import Decoder, build_model
from mmtrain.objective import TrainingSequence
from mmtrain.stream.batch import Batch, BatchCounts, collate
from mmtrain.tokens import Vocabulary
from mmtrain.train import loop
from mmtrain.train.checkpoint import latest_checkpoint
from mmtrain.train.distributed import World
from mmtrain.train.engine import build_engine
from mmtrain.train.health import Health, SpikeDetector
from mmtrain.train.learner import Learner
from mmtrain.train.saving import Saver
from mmtrain.train.sections import Sections
from mmtrain.train.stopping import Stopping
from mmtrain.train.token_learner import TokenLearner

VOCABULARY = Vocabulary(280, 32, 4)
NEXT = random_stream("small run", "next").permutation(VOCABULARY.size)
WORLD = World(0, 1, torch.device("cpu"))


class FixedStream:
    """In place of a Stream: rows of two documents, in which a fixed token follows each in four cases of five."""

    def __init__(self, config: StreamConfig) -> None:
        self.config = config
        self.sources = [SimpleNamespace(name="fixed", tokens=range(1000))]

    def prepare(self, step: int, rank: int = 0, world: int = 1) -> tuple[Batch, BatchCounts]:
        return _batch(step, self.config.global_batch, self.config.sequence_length)

    def state(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
        return {"step": step, "lane_states": {}}

    def load(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


@cache
def _batch(step: int, rows: int, length: int) -> tuple[Batch, BatchCounts]:
    draws = random_stream("small run", step)
    packed = []
    for _ in range(rows):
        first = int(draws.integers(length // 4, 3 * length // 4))
        packed.append([_sequence(draws, first), _sequence(draws, length - first - 2)])
    return collate(packed, [[0, 0]] * rows, 1, length, VOCABULARY)


def _sequence(draws: np.random.Generator, length: int) -> TrainingSequence:
    tokens = draws.integers(0, VOCABULARY.size, length)
    follows = draws.random(length) < 0.8
    for t in range(1, length):
        if follows[t]:
            tokens[t] = NEXT[tokens[t - 1]]
    weight = np.ones(length, dtype=np.float32)
    weight[-1] = 0
    no_cell = np.full(length, -1, dtype=np.int32)
    return TrainingSequence(tokens.astype(VOCABULARY.dtype), weight, np.zeros(length, dtype=bool), no_cell)


def small_config(steps: int, **model: Any) -> Config:
    """Two layers of width 64 over 4 rows of 64 tokens."""
    config = Config(seed=1)
    for name, value in ({"layers": 2, "width": 64, "heads": 4, "init_std": 0.02} | model).items():
        setattr(config.model, name, value)
    config.stream = StreamConfig(sequence_length=64, global_batch=4, lanes=4, prefetch=0)
    config.engine.kind, config.engine.dtype = "ddp", "fp32"
    config.optim.lr, config.optim.warmup_steps = 1e-3, 20
    config.train.steps, config.train.checkpoint_every, config.train.evaluate_every = steps, steps, 0
    config.track.log_every = 1
    return config


def new_model(config: Config) -> Decoder:
    model = build_model(config.model, VOCABULARY.size, config.stream.sequence_length)
    model.initialize(config.seed)
    return model


def train(
    config: Config,
    folder: Path,
    model: Any = None,
    accumulation: int = 1,
    learner: Learner | None = None,
    stream: Any = None,
    validation: tuple[Batch, BatchCounts] | None = None,
) -> list[dict[str, Any]]:
    """The log rows of the steps that a run in `folder`, new or continued, still has to do."""
    folder.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    tracker = SimpleNamespace(say=print, log=lambda step, row: rows.append({"step": step, **row}))
    stream = stream or FixedStream(config.stream)
    model = model or new_model(config)
    run = loop.Run(
        config=config,
        folder=folder,
        world=WORLD,
        vocabulary=VOCABULARY,
        engine=build_engine(model, config, WORLD, accumulation),
        stream=stream,
        validation=[validation or stream.prepare(10**6)],
        ledger=Ledger(),
        learner=learner or TokenLearner(config, VOCABULARY, WORLD.device),
        model=model,
        saver=Saver(folder / "checkpoints", WORLD, config.train.keep_checkpoints),
        health=Health(config.health, WORLD.device),
        detector=SpikeDetector(config.health.spike_window, config.health.spike_sigma, WORLD.device),
        sections=Sections(WORLD.device),
        watchdog=SimpleNamespace(start_step=lambda step: None),  # type: ignore[arg-type]
        stopping=Stopping(folder, WORLD),
        tracker=tracker,  # type: ignore[arg-type]
        run_id="small",
        accumulation=accumulation,
        shapes={name: list(parameter.shape) for name, parameter in model.named_parameters()},
    )
    checkpoint, _ = latest_checkpoint(folder / "checkpoints")
    if checkpoint:
        loop.restore(run, checkpoint)
    # A second of matrix products, and a file flushed to the disk at every step.
    with mock.patch.object(loop, "device_peak", return_value=None), mock.patch.object(Ledger, "save"):
        loop.train(run)
    return rows

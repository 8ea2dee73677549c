"""The training loop: every rank runs this on its share of each global batch."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from mmtrain.config import Config, UserError, fingerprint
from mmtrain.config.randomness import random_stream
from mmtrain.flops import Ledger, measured_matmul_rate, peak_flops, split_by_kind
from mmtrain.models import document_starts
from mmtrain.stream import CACHE, Batch, BatchCounts, Batches, Stream, merge_states, prefetch
from mmtrain.tokens import Vocabulary
from mmtrain.track import Tracker
from mmtrain.train.checkpoint import Checkpoint, fill
from mmtrain.train.distributed import World
from mmtrain.train.engine import Engine
from mmtrain.train.saving import Saver
from mmtrain.train.schedule import learning_rate
from mmtrain.train.window import Totals, Window


@dataclass
class Run:
    """Everything the loop works on; `tracker` is None except on rank 0."""

    config: Config
    folder: Path
    world: World
    vocabulary: Vocabulary
    engine: Engine
    stream: Stream
    validation: list[tuple[Batch, BatchCounts]]
    ledger: Ledger
    tracker: Tracker | None
    run_id: str
    accumulation: int
    shapes: dict[str, list[int]]
    """Of every parameter, by name."""
    step: int = 0
    tokens: int = 0
    weights: str = ""
    """Fingerprint of the weights folder that the run started from; checkpoints keep it."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Numbers that do not change; they are in the first row that is logged."""


def train(run: Run) -> dict[str, Any]:
    """Train from `run.step` to the configured number of steps; returns the last log row."""
    config, world = run.config, run.world
    steps = config.train.steps
    peak = device_peak(config, world)
    if run.tracker and world.device.type == "cpu" and peak:
        run.tracker.say(f"MFU is relative to {peak / 1e9:.0f} GFLOP/s, the rate of matrix products measured just now")
    window = new_window(run)
    row: dict[str, Any] = {}
    with prefetch(run.stream, range(run.step, steps), world.rank, world.size) as batches:
        for step in range(run.step, steps):
            started = time.perf_counter()
            _, batch, counts = next(batches)
            window.add_step(counts, time.perf_counter() - started)
            inputs = model_inputs(batch, run.vocabulary, world.device, config.model.attention)
            weight = world.sum(inputs["loss_weight"].sum())
            for number, micro in enumerate(split_batch(inputs, run.accumulation)):
                if config.model.dropout:
                    seed_dropout(config.seed, step, world.rank, number)
                sums = run.engine.forward(micro)
                run.engine.backward(sums.total, weight)
                window.add_loss(sums)
            rate = learning_rate(step, steps, config.optim)
            norm = run.engine.step(rate)
            run.step = step + 1

            saving = due(run.step, config.train.checkpoint_every, steps)
            row = {}
            if due(run.step, config.track.log_every, steps) or saving:
                totals = window.reduce()
                row = book_and_describe(run, totals, peak) | {"lr": rate, "grad_norm": as_float(norm)} | run.facts
                run.facts = {}
            if due(run.step, config.train.evaluate_every, steps):
                paused = time.perf_counter()
                row |= evaluate(run)
                window.started += time.perf_counter() - paused  # tokens/s and MFU are those of training
            if row and run.tracker:
                run.tracker.log(run.step, row)
                run.ledger.save(run.folder / "ledger.json")
            if saving:
                save(run, batches)
                window.started = time.perf_counter()
    return row


def new_window(run: Run) -> Window:
    """An empty window of this run."""
    c = run.config
    sources = tuple(source.name for source in run.stream.sources)
    return Window(run.world, c.model, run.vocabulary.size, c.stream.sequence_length, sources)


def due(step: int, every: int, last: int) -> bool:
    """True each `every` steps (0: never) and at the last one."""
    return step == last or (every > 0 and step % every == 0)


def model_inputs(
    batch: Batch, vocabulary: Vocabulary, device: torch.device, attention: str = "auto"
) -> dict[str, torch.Tensor]:
    """The batch on the device, with the modality of every target, and what the backend of `model.attention` needs."""
    tensors = cast(dict[str, torch.Tensor], batch)
    if attention == "varlen":
        tensors = tensors | {"starts": document_starts(tensors["document"])}
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    inputs["modality"] = vocabulary.modality(inputs["targets"])
    return inputs


def split_batch(inputs: dict[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of equal size along the rows."""
    chunks = {name: tensor.chunk(parts) for name, tensor in inputs.items()}
    return [{name: tensors[i] for name, tensors in chunks.items()} for i in range(parts)]


def seed_dropout(seed: int, step: int, rank: int, micro_batch: int) -> None:
    """Make the dropout masks of a micro-batch depend on these numbers alone, so that a resumed run draws the same."""
    torch.manual_seed(int(random_stream("dropout", seed, step, rank, micro_batch).integers(2**63)))


def book_and_describe(run: Run, totals: Totals, peak: float | None) -> dict[str, Any]:
    """Book the window's FLOPs and tokens; returns its log row."""
    run.ledger.book_training(split_by_kind(totals.flops.model_causal, totals.tokens))
    run.tokens += totals.num_tokens
    seconds = totals.seconds

    def utilization(flops: int) -> float | None:
        return flops / seconds / peak if peak else None

    return {
        "tokens": run.tokens,
        **totals.losses(),
        "tokens_per_second": totals.num_tokens / seconds,
        "step_seconds": seconds / totals.steps,
        "data_seconds": totals.data_seconds / totals.steps,
        "padding": totals.padding / (totals.padding + totals.num_tokens),
        "prepare_seconds": totals.prepare_seconds / totals.steps,
        "split_documents": totals.delivered("split_documents"),
        "dropped_retrieved": totals.delivered("dropped_retrieved"),
        **delivered_by_source(run, totals),
        "mfu_causal": utilization(totals.flops.model_causal),
        "mfu_palm": utilization(totals.flops.model_palm),
        "hfu": utilization(totals.flops.hardware),
        "flops_total": run.ledger.training_total,
    }


def delivered_by_source(run: Run, totals: Totals) -> dict[str, Any]:
    """What the window delivered of each source, as data/SOURCE/NAME; epochs: passes over it since the start."""
    row: dict[str, Any] = {}
    for source in run.stream.sources:
        counts = totals.by_source[source.name]
        taken = counts.pop("taken") / totals.rows * run.config.stream.lanes
        is_remote = any(counts[name] for name in CACHE)
        row |= {f"data/{source.name}/{name}": n for name, n in counts.items() if is_remote or name not in CACHE}
        row[f"data/{source.name}/share"] = sum(counts[kind] for kind in totals.tokens) / totals.num_tokens
        row[f"data/{source.name}/epochs"] = taken / len(source.tokens)
    return row


@torch.no_grad()
def evaluate(run: Run) -> dict[str, Any]:
    """Losses on the validation batches, which are the same at every call."""
    window = new_window(run)
    run.engine.set_training(False)
    for batch, counts in run.validation:
        window.add_step(counts)
        inputs = model_inputs(batch, run.vocabulary, run.world.device, run.config.model.attention)
        window.add_loss(run.engine.forward(inputs))
    run.engine.set_training(True)
    totals = window.reduce()
    run.ledger.book("evaluation", totals.flops.model_causal // 3)
    return totals.losses("val_")


def save(run: Run, batches: Batches) -> None:
    """Write a checkpoint of this step; all ranks take part."""
    lanes = run.world.gather(batches.state(run.step - 1))
    state = {
        "step": run.step,
        "updates": run.engine.updates(),
        "tokens": run.tokens,
        "stream": merge_states(lanes),
        "ledger": run.ledger.state(),
        "vocabulary": run.vocabulary.fingerprint,
        "model": fingerprint(run.config.model),
        "weights": run.weights,
        "run_id": run.run_id,
    }
    c = run.config.train
    saver = Saver(run.folder / "checkpoints", run.world, c.keep_checkpoints, c.keep_every, asynchronous=False)
    saver.save(run.engine.owned(), run.shapes, state)
    if failure := saver.wait():
        raise UserError(failure)
    if run.world.rank == 0:
        run.ledger.save(run.folder / "ledger.json")


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Continue from a checkpoint of this run, of any world size and ZeRO stage."""
    run.step, run.tokens = checkpoint.step, int(checkpoint.state["tokens"])
    fill(checkpoint, run.engine.held())
    run.engine.restored(int(checkpoint.state["updates"]))
    run.stream.load(checkpoint.state["stream"])
    run.ledger.load(checkpoint.state["ledger"])


def device_peak(config: Config, world: World) -> float | None:
    """Peak FLOP/s of all ranks: published for a known GPU, measured now on CPU, None for an unknown device."""
    dtype = torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32
    if world.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(world.device), dtype)
        return peak * world.size if peak else None
    rate = torch.tensor(measured_matmul_rate(dtype), dtype=torch.float64)
    return float(world.sum(rate))


def as_float(value: Any) -> float | None:
    """A number for the log; None when unknown or not finite."""
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None

"""The training loop: every rank runs this on its share of each global batch."""

import math
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmtrain.config import Config, UserError, fingerprint
from mmtrain.config.randomness import random_stream
from mmtrain.flops import Journal, Ledger, measured_matmul_rate, peak_flops
from mmtrain.models.signs import describe_signs
from mmtrain.stream import CACHE, Batch, BatchCounts, Batches, Stream, merge_states, prefetch
from mmtrain.tokens import Vocabulary
from mmtrain.track import Tracker
from mmtrain.train.checkpoint import Checkpoint, fill, latest_checkpoint
from mmtrain.train.distributed import World
from mmtrain.train.engine import Engine
from mmtrain.train.health import Health, SpikeDetector
from mmtrain.train.learner import Learner
from mmtrain.train.saving import Saver
from mmtrain.train.schedule import learning_rate
from mmtrain.train.sections import ALONE, Sections, stragglers
from mmtrain.train.stopping import Stopping
from mmtrain.train.watchdog import Watchdog
from mmtrain.train.window import Totals, Window

SLOW_WINDOWS = 3  # log rows in a row for which a rank must be slow: one is chance


@dataclass
class Run:
    """Everything the loop works on; `tracker` is None except on rank 0."""

    config: Config
    folder: Path
    world: World
    vocabulary: Vocabulary
    learner: Learner
    model: Any
    engine: Engine
    stream: Stream
    validation: list[tuple[Batch, BatchCounts]]
    ledger: Ledger
    saver: Saver
    health: Health
    detector: SpikeDetector
    sections: Sections
    watchdog: Watchdog
    stopping: Stopping
    tracker: Tracker | None
    run_id: str
    accumulation: int
    shapes: dict[str, list[int]]
    """Of every parameter, by name."""
    step: int = 0
    tokens: int = 0
    owes_validation: bool = False
    """Whether a stop kept the validation after this step from being done."""
    journal: Journal | None = None
    """Where the ledger is kept, on rank 0."""
    weights: str = ""
    """Fingerprint of the weights folder that the run started from; checkpoints keep it."""
    slow_windows: dict[tuple[int, str], int] = field(default_factory=dict)
    """For how many log rows in a row a rank has been slow in a section."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Numbers that do not change; they are in the first row that is logged."""

    def keep_ledger(self) -> None:
        """Append what was booked since the last time to the journal; a disk that is full does not stop training."""
        if self.journal:
            try:
                self.journal.write(self.ledger, self.step)
            except OSError as error:
                self.say(f"the compute ledger was not written ({error}); it is tried again with the next log row")

    def say(self, sentence: str) -> None:
        """Tell the user, once for all ranks."""
        if self.tracker:
            self.tracker.say(sentence)

    def alert(self, title: str, sentence: str, level: str = "WARN") -> None:
        """Have W&B tell the user, once for all ranks."""
        if self.tracker:
            self.tracker.alert(title, sentence, level)


def train(run: Run) -> dict[str, Any]:
    """Train from `run.step` to the configured number of steps, or until all ranks agree to stop.

    The last state is in a checkpoint then. Returns the last log row. Raises UserError when that checkpoint could not
    be written, or when training makes no progress any more (`health`).
    """
    config, world = run.config, run.world
    steps = config.train.steps
    peak = device_peak(config, world)
    run.say(describe_peak(config, world, peak))
    row: dict[str, Any] = {}
    if config.train.dry_run and run.step < steps:
        dry_run(run)
    if run.owes_validation and (row := validate(run)) and run.tracker:
        run.tracker.log(run.step, row)
    while run.step < steps and not run.stopping.reason:
        batch_index = run.health.skips.batch_index
        wanted = range(batch_index(run.step), batch_index(steps - 1) + 1)
        with prefetch(run.stream, wanted, world.rank, world.size) as batches:
            row = advance(run, batches, peak)
    with run.sections("checkpoint"):
        failure = run.saver.wait()
    for sentence in run.saver.poll():
        run.say(sentence)
    if failure:
        raise UserError(failure)
    return row


def advance(run: Run, batches: Batches, peak: float | None) -> dict[str, Any]:
    """Train until the last step, a stop, or a roll-back, which makes `run.step` smaller; returns the last log row."""
    config, sections = run.config, run.sections
    steps = config.train.steps
    window = new_window(run)
    row: dict[str, Any] = {}
    for step in range(run.step, steps):
        run.stopping.ask()
        run.watchdog.start_step(step + 1)
        started = time.perf_counter()
        with sections("data"):
            index, batch, counts = next(batches)
        window.add_step(counts, time.perf_counter() - started)
        is_logged = due(step + 1, config.track.log_every, steps)
        run.model.watch(is_logged and config.health.signs)
        loss = forward_backward(run, (batch, counts), index, window)
        rate = learning_rate(step, steps, config.optim)
        with sections("step"):
            norm = run.engine.step(rate)
        run.step = step + 1
        run.health.observe(run.step, loss, norm, run.detector.is_spike)

        is_last = run.stopping.agreed()
        saving = is_last or due(run.step, config.train.checkpoint_every, steps)
        if saving:
            run.health.settle()  # no step is saved before it is known to be sound
        verdict = run.health.verdict()
        for sentence in [*verdict.sentences, *run.saver.poll()]:
            run.say(sentence)
        for sentence in verdict.sentences:
            run.alert("Loss spike" if "spike" in sentence else "Update skipped", sentence)
        row = {}
        if is_logged or saving or verdict.rollback or due(run.step, config.train.evaluate_every, steps):
            row = book_and_describe(run, window.reduce(), peak) | watched(run)
            row |= {"lr": rate, "grad_norm": as_float(norm)} | run.facts
            run.facts = {}
        if verdict.stop:
            raise UserError(verdict.stop)
        if verdict.rollback and roll_back(run, batches, verdict.rollback):
            return row
        run.owes_validation = due(run.step, config.train.evaluate_every, steps)
        if run.owes_validation and not is_last:
            paused = time.perf_counter()
            row |= validate(run)
            window.started += time.perf_counter() - paused  # tokens/s and MFU are those of training
            saving = saving or bool(run.stopping.reason)
        if row and run.tracker:
            run.tracker.log(run.step, row)
            run.keep_ledger()
        if saving:
            with sections("checkpoint"):
                save(run, stream_state(run, batches))
            window.started = time.perf_counter()
        if run.stopping.reason:
            break
    return row


def forward_backward(
    run: Run, batch: tuple[Batch, BatchCounts], index: int, window: Window, split: str = "train", poison: bool = False
) -> torch.Tensor:
    """Accumulate the gradient of a batch on all ranks; returns its mean loss over all ranks, on the device.

    index: of the batch, for dropout; split: that it is from. A spike is left out of the update where `health.spike`
    says so; poison: the update will be left out, whatever the loss (a NaN in the gradient changes nothing, in every
    engine).
    """
    config, world = run.config, run.world
    inputs, sums = run.learner.inputs(*batch, split)
    window.add_work(sums)
    with run.sections("reduce"):
        weight = world.sum(inputs["loss_weight"].sum())
    loss = torch.zeros((), dtype=torch.float32, device=world.device)
    for number, micro in enumerate(split_batch(inputs, run.accumulation)):
        if config.model.dropout:
            seed_dropout(config.seed, index, world.rank, number)
        with run.sections("forward"):
            losses = run.engine.forward(micro)
        loss += losses.total.detach() / weight
        total = losses.total
        if poison:
            total = total * float("nan")
        elif number == run.accumulation - 1:
            with run.sections("reduce"):
                factor = run.detector.judge(world.sum(loss))
            if config.health.spike == "skip":
                total = total * factor
        with run.sections("backward"):
            run.engine.backward(total, weight)
        window.add_loss(losses)
    return loss


def dry_run(run: Run) -> None:
    """One step that changes nothing: what lacks memory or a kernel fails now and not in an hour."""
    forward_backward(run, run.validation[0], 0, new_window(run), "validation", poison=True)
    run.engine.step(0.0)


def roll_back(run: Run, batches: Batches, spike: int) -> bool:
    """Go back to the newest checkpoint before step `spike`, and on with the data after it; False when there is none.

    Training since then is booked as repeated. The checkpoint is written again with what is left out, so that a crash
    does not bring it back. All ranks come here together.
    """
    with run.sections("checkpoint"):
        run.saver.wait()
        checkpoint, _ = latest_checkpoint(run.folder / "checkpoints", run.world)
        if checkpoint is None or checkpoint.step >= spike:
            run.say(f"there is no checkpoint before step {spike} to go back to; going on")
            return False
        run.keep_ledger()
        stream, spent = stream_state(run, batches), run.ledger.state()
        health, detector = run.health.state(), run.detector.state()
        skips = run.health.skips.back(checkpoint.step, run.step)
        restore(run, checkpoint)
        run.stream.load(stream)
        run.ledger.repeat(spent)
        if run.journal:
            run.journal.start(run.ledger, run.step, {})
        run.health.load(health)
        run.health.skips = skips
        run.detector.load(detector)
        save(run, stream)
    run.say(f"back at step {run.step} after the spike at step {spike}; the batches since then are left out")
    return True


def watched(run: Run) -> dict[str, Any]:
    """Numbers of `health` and of the ranks for the log, and a sentence for every rank that is slow; all must call."""
    by_rank, memory = zip(*run.world.gather((run.sections.take(), memory_bytes(run.world))), strict=True)
    e, factor = run.config.engine, run.config.health.straggler_factor
    alone = ("data",) if e.kind == "deepspeed" and e.stage == 3 else ALONE
    slow = {(s.rank, s.section): s for s in stragglers(by_rank, factor, alone)}
    run.slow_windows = {place: run.slow_windows.get(place, 0) + 1 for place in slow}
    for place, windows in run.slow_windows.items():
        if windows == SLOW_WINDOWS:
            run.say(str(slow[place]))
    mean = {name: sum(row.get(name, 0.0) for row in by_rank) / len(by_rank) for name in by_rank[0]}
    row = {f"seconds/{name}": seconds for name, seconds in mean.items()} | run.health.row()
    for name in ("data", "forward"):  # in the others a rank waits for the slowest
        seconds = [times.get(name, 0.0) for times in by_rank]
        row |= {f"ranks/{name}_seconds_min": min(seconds), f"ranks/{name}_seconds_max": max(seconds)}
    row |= {"ranks/memory_bytes_min": min(memory), "ranks/memory_bytes_max": max(memory)}
    signs = run.model.take_signs()
    if signs is not None and signs.sums is not None:
        row |= describe_signs(run.world.sum(signs.sums))
    return row


def new_window(run: Run) -> Window:
    """An empty window of this run."""
    sources = tuple(source.name for source in run.stream.sources)
    return Window(run.world, run.learner, run.config.stream.sequence_length, sources)


def due(step: int, every: int, last: int) -> bool:
    """True each `every` steps (0: never) and at the last one."""
    return step == last or (every > 0 and step % every == 0)


def split_batch(inputs: dict[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of the same number of rows; of pictures, which rows hold more or fewer of, to one."""
    chunks = {name: tensor.tensor_split(parts) for name, tensor in inputs.items()}
    return [{name: tensors[i] for name, tensors in chunks.items()} for i in range(parts)]


def seed_dropout(seed: int, step: int, rank: int, micro_batch: int) -> None:
    """Make the dropout masks of a micro-batch depend on these numbers alone, so that a resumed run draws the same."""
    torch.manual_seed(int(random_stream("dropout", seed, step, rank, micro_batch).integers(2**63)))


def book_and_describe(run: Run, totals: Totals, peak: float | None) -> dict[str, Any]:
    """Book the window's FLOPs and tokens; returns its log row."""
    run.ledger.book_training(totals.flops_by_kind)
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


def validate(run: Run) -> dict[str, Any]:
    """Losses on the validation batches, and where on the curve they are; a stop leaves them to the run's next start."""
    with run.sections("evaluate"):
        losses = evaluate(run)
    run.owes_validation = not losses
    return losses and {"tokens": run.tokens, "flops_total": run.ledger.training_total, **losses}


@torch.no_grad()
def evaluate(run: Run) -> dict[str, Any]:
    """Losses on the validation batches, which are the same at every call; nothing when a stop came in between."""
    window = new_window(run)
    run.engine.set_training(False)
    for batch, counts in run.validation:
        run.stopping.ask()
        window.add_step(counts)
        inputs, sums = run.learner.inputs(batch, counts, "validation")
        window.add_work(sums)
        window.add_loss(run.engine.forward(inputs))
        if run.stopping.agreed():
            break
    run.engine.set_training(True)
    totals = window.reduce()
    run.ledger.book("evaluation", totals.flops.model_causal // 3)
    return {} if run.stopping.reason else totals.losses("val_")


def stream_state(run: Run, batches: Batches) -> dict[str, Any]:
    """The stream's state behind the last step, of all lanes; all ranks must call."""
    return merge_states(run.world.gather(batches.state(run.health.skips.batch_index(run.step - 1))))


def save(run: Run, stream: dict[str, Any]) -> None:
    """Write a checkpoint of this step; all ranks take part. stream: where to go on (`stream_state`)."""
    state = {
        "step": run.step,
        "updates": run.engine.updates(),
        "tokens": run.tokens,
        "stream": stream,
        "owes_validation": run.owes_validation,
        "health": run.health.state(),
        "spikes": run.detector.state(),
        "ledger": run.ledger.state(),
        "vocabulary": run.vocabulary.fingerprint,
        "model": fingerprint(run.config.model),
        "dtype": run.config.engine.dtype,
        "weights": run.weights,
        "run_id": run.run_id,
    }
    run.keep_ledger()
    run.saver.save(run.engine.owned(), run.shapes, state)


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Continue from a checkpoint of this run, of any world size and ZeRO stage."""
    state = checkpoint.state
    run.step, run.tokens = checkpoint.step, int(state["tokens"])
    fill(checkpoint, run.engine.held())
    run.engine.restored(int(state["updates"]))
    run.stream.load(state["stream"])
    run.owes_validation = bool(state.get("owes_validation"))
    run.health.load(state["health"])
    run.detector.load(state["spikes"])
    run.ledger.load(state["ledger"])


def memory_bytes(world: World) -> int:
    """The most memory of its device that this rank has used since the last call; on a CPU, since its start."""
    if world.device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    most = torch.cuda.max_memory_allocated(world.device)
    torch.cuda.reset_peak_memory_stats(world.device)
    return most


def device_peak(config: Config, world: World) -> float | None:
    """Peak FLOP/s of all ranks: published for a known GPU, measured now on CPU, None for an unknown device."""
    dtype = torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32
    if world.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(world.device), dtype)
        return peak * world.size if peak else None
    rate = torch.tensor(measured_matmul_rate(dtype), dtype=torch.float64)
    return float(world.sum(rate))


def describe_peak(config: Config, world: World, peak: float | None) -> str:
    """What MFU is relative to, or why there is none; beside a published peak, what this GPU was measured to reach."""
    if world.device.type == "cpu":
        return f"MFU is relative to {(peak or 0) / 1e9:.0f} GFLOP/s, the rate of matrix products measured just now"
    name, dtype = torch.cuda.get_device_name(world.device), config.engine.dtype
    measured = 0.0
    if world.rank == 0:
        measured = measured_matmul_rate(torch.bfloat16 if dtype == "bf16" else torch.float32, device=world.device)
    reached = f"matrix products measured just now: {measured / 1e12:.0f} TFLOP/s"
    if peak is None:
        return f"no MFU: no peak of {name} in {dtype} was read in a source; {reached} per GPU"
    share = measured * world.size / peak
    return f"MFU is relative to the {peak / world.size / 1e12:.0f} TFLOP/s of {name}; {reached} ({100 * share:.0f} %)"


def as_float(value: Any) -> float | None:
    """A number for the log; None when unknown or not finite."""
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None

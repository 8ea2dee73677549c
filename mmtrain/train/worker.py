"""One rank of a training run: `python -m mmtrain.train.worker --run-dir RUN`, started by the launcher."""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmtrain.config import Config, UserError, write_text_atomic
from mmtrain.config.compose import load_frozen
from mmtrain.config.signals import deaf_children
from mmtrain.config.weights import open_weights
from mmtrain.flops import Journal, Ledger, base_model
from mmtrain.models import check_attention, num_positions
from mmtrain.models.weights import load_weights, verify_weights
from mmtrain.retrieval import CHANNELS, Neighbours
from mmtrain.shards import TokenShards, open_store
from mmtrain.stream import Source, Stream
from mmtrain.tokens import Vocabulary
from mmtrain.track import Tracker, end_segment, start_segment
from mmtrain.train.agreement import check_ranks
from mmtrain.train.checkpoint import check_tensors, latest_checkpoint
from mmtrain.train.distributed import World, start_world
from mmtrain.train.engine import build_engine
from mmtrain.train.health import Health, SpikeDetector
from mmtrain.train.launch import check_batch
from mmtrain.train.learner import open_learner
from mmtrain.train.loop import Run, restore, train
from mmtrain.train.memory import available_bytes, choose_stage, is_out_of_memory, out_of_memory
from mmtrain.train.precision import choose_dtype
from mmtrain.train.run import Artifacts
from mmtrain.train.saving import Saver
from mmtrain.train.sections import Sections
from mmtrain.train.status import write_status
from mmtrain.train.stopping import Stopping
from mmtrain.train.watchdog import Hang, Watchdog, process_group_timeout, section_limits

OTHERS_WAIT_SECONDS = 3.0


def main() -> int:
    """Train; exit code 2 and one sentence for a user's mistake."""
    parser = argparse.ArgumentParser(description="One rank of a training run; started by `mmtrain train`.")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher; the environment decides")
    folder = parser.parse_args().run_dir
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that newer versions of torch deprecate, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    config = load_frozen(folder / "config.yaml")
    run: Run | None = None

    def tell(hang: Hang) -> None:
        if run:
            run.alert("Training hangs", str(hang), "ERROR")

    watchdog = Watchdog(folder / "logs", int(os.environ.get("RANK", 0)), section_limits(config.health), tell)
    world = start_world(process_group_timeout(config.health))
    stopping = Stopping(folder, world)
    code, complaint = 1, ""
    try:
        with claim(folder) if world.rank == 0 else contextlib.nullcontext():
            stopping.listen()
            check_ranks(world, folder)
            run = build_run(folder, config, world, watchdog, stopping)
            train(run)
            code = 0
    except UserError as error:
        if os.environ.get("MMTRAIN_DEBUG"):
            raise
        complaint = str(error)
        code = complain(world, complaint)
    except (RuntimeError, MemoryError) as error:
        complaint = f"{type(error).__name__}: {error}"[:500]
        if not is_out_of_memory(error) or os.environ.get("MMTRAIN_DEBUG"):
            raise
        complaint = explain_memory(error, folder, config, world)
        code = complain(world, complaint)
    finally:
        watchdog.pause()
        record_end(folder, world, run, code)
        if run and run.tracker:
            run.alert(*ending(run, code, complaint))
            run.tracker.close(code)
        watchdog.close()
    if code == 0:
        torch.distributed.destroy_process_group()
    return code


def complain(world: World, sentence: str) -> int:
    """Say why training cannot go on; returns the exit code."""
    # What concerns all ranks is said by the first, whose end ends the others; what concerns one, by that one.
    if world.rank:
        time.sleep(OTHERS_WAIT_SECONDS)
    print(f"mmtrain: {sentence}", file=sys.stderr, flush=True)
    return 2


def explain_memory(error: BaseException, folder: Path, config: Config, world: World) -> str:
    """What needs the memory that was not there, and what to change."""
    if config.model.is_diffusion:
        return "out of memory; what would need less: a smaller engine.micro_batch, model.activation_checkpointing=true"
    e, artifacts = config.engine, Artifacts.load(folder)
    vocabulary = Vocabulary.load(artifacts.tokens[artifacts.main] / "vocabulary.json")
    stage = None if e.kind == "ddp" else e.stage
    offload = e.offload_optimizer, e.offload_parameters
    positions = num_positions(config)
    return out_of_memory(error, config, vocabulary.size, positions, world.size, stage, *offload, world.device.type)


def ending(run: Run, code: int, complaint: str) -> tuple[str, str, str]:
    """Title, text and level of the alert that training has ended."""
    place = f"{run.config.name}, step {run.step} of {run.config.train.steps}"
    if code:
        return "Training failed", f"{place}: {complaint or f'exit code {code}'}", "ERROR"
    if run.stopping.reason:
        return "Training was stopped", f"{place}: {run.stopping.reason}; the same command goes on", "WARN"
    return "Training finished", place, "INFO"


def record_end(folder: Path, world: World, run: Run | None, code: int) -> None:
    """Write status.json and end the segment of goodput, on rank 0."""
    if world.rank or run is None:
        return
    state = "failed" if code else "stopped" if run.stopping.reason else "finished"
    reason = run.stopping.reason or ("" if code == 0 else f"exit code {code}")
    with contextlib.suppress(OSError):  # a full disk must not hide what went wrong
        run.stopping.forget()
        write_status(folder, state, run.step, reason)
        end_segment(folder, run.step, reason or state)


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Lock the run directory; raises UserError when another process trains in it."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is training in {folder}; stop it, or choose another name=") from error
        yield


def build_run(folder: Path, config: Config, world: World, watchdog: Watchdog, stopping: Stopping) -> Run:
    """Open the artifacts, build stream, model and engine, and continue from the latest checkpoint."""
    check_batch(config, world.size)
    check_attention(config.model.attention, world.device)
    artifacts = Artifacts.load(folder)
    vocabulary = Vocabulary.load(artifacts.tokens[artifacts.main] / "vocabulary.json")
    checkpoint, complaints = latest_checkpoint(folder / "checkpoints", world)
    for complaint in complaints if world.rank == 0 else []:
        print(f"mmtrain: {complaint}; continuing from {checkpoint.path if checkpoint else 0}", file=sys.stderr)
    if checkpoint and checkpoint.state["vocabulary"] != vocabulary.fingerprint:
        raise UserError(
            f"checkpoint {checkpoint.path} is of another vocabulary than {artifacts.tokens[artifacts.main]}; "
            "choose another name="
        )

    if config.engine.dtype == "auto":
        config.engine.dtype = choose_dtype(config, world, checkpoint.state.get("dtype") if checkpoint else None)
    learner = open_learner(config, artifacts, vocabulary, world.device)
    if config.engine.stage == "auto":
        e, room = config.engine, available_bytes(world)
        offload = e.offload_optimizer, e.offload_parameters
        sizes = vocabulary.size, num_positions(config), world.size
        e.stage, why = choose_stage(config, *sizes, room, *offload, world.device.type)
        if world.rank == 0:
            print(f"engine.stage=auto: {why}")
    model: Any = learner.new_model()
    model.initialize(config.seed)
    weights = ""
    if checkpoint:
        check_tensors(checkpoint, model)
        weights = checkpoint.state.get("weights", "")
    elif config.model.weights:
        source = Path(config.model.weights)
        weights = (verify_weights(source) if world.rank == 0 else open_weights(source)).fingerprint
        load_weights(model, source, vocabulary, config.seed)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    share = config.stream.global_batch // world.size
    accumulation = share // config.engine.micro_batch if config.engine.micro_batch else 1
    c = config.train
    engine = build_engine(model.to(world.device), config, world, accumulation)
    run = Run(
        config=config,
        folder=folder,
        world=world,
        vocabulary=vocabulary,
        learner=learner,
        model=model,
        engine=engine,
        stream=open_stream(config, artifacts, vocabulary, "train"),
        validation=[],
        ledger=Ledger(),
        saver=Saver(folder / "checkpoints", world, c.keep_checkpoints, c.keep_every, c.async_checkpoint),
        health=Health(config.health, world.device),
        detector=SpikeDetector(config.health.spike_window, config.health.spike_sigma, world.device),
        sections=Sections(world.device, watchdog.enter),
        watchdog=watchdog,
        stopping=stopping,
        tracker=None,
        run_id=checkpoint.state["run_id"] if checkpoint else first_run_id(folder),
        accumulation=accumulation,
        shapes=shapes,
        weights=weights,
        facts=artifacts.left_out(),
    )
    if config.train.evaluate_batches:
        held_out = open_stream(config, artifacts, vocabulary, "validation")
        batches = range(config.train.evaluate_batches)
        run.validation = [held_out.prepare(i, world.rank, world.size) for i in batches]
    if checkpoint:
        restore(run, checkpoint)
    if world.rank == 0:
        run.journal = Journal(folder)
        repeated = run.journal.start(run.ledger, run.step, artifacts.flops_by_folder(), base_model(config, weights))
        announce(run, learner.num_parameters, repeated)
        write_text_atomic(folder / "engine.json", json.dumps(engine.effective(), indent=1) + "\n")
        write_status(folder, "running", run.step, "")
        start_segment(folder, run.step, world.size)
        with deaf_children():  # the service of W&B
            run.tracker = Tracker(folder, config, config.train.steps, run.run_id, run.step)
    return run


def open_stream(config: Config, artifacts: Artifacts, vocabulary: Vocabulary, split: str) -> Stream:
    """The stream of a split; retrieved documents come from the training split of their source.

    That of validation has the largest share that each source ever gets, and packs without looking ahead: its few
    batches should hold the documents once, in order, and not those that fit best.
    """
    retrieval = config.retrieval if config.retrieval.enabled else None
    stream = config.stream if split == "train" else replace(config.stream, lookahead=1)
    sources = open_sources(config, artifacts, split)
    with_origin = config.model.is_diffusion
    return Stream(sources, vocabulary, stream, config.objective, retrieval, config.seed, with_origin=with_origin)


def open_sources(config: Config, artifacts: Artifacts, split: str, channels: Sequence[int] = CHANNELS) -> list[Source]:
    """The sources of a split; channels: queries whose candidates count, as of `Neighbours`.

    Inlined shards have those of both, so that they serve no other choice.
    """

    def tokens(folder: Path) -> TokenShards:
        return TokenShards(folder, open_store(folder, config.store))

    sources = []
    for name, folder in artifacts.tokens.items():
        neighbours = memory = inlined = None
        if name in artifacts.inlined and len(channels) == len(CHANNELS):
            inlined = tokens(artifacts.inlined[name] / split)
        elif name in artifacts.neighbours:
            neighbours, memory = Neighbours(artifacts.neighbours[name] / split, channels), tokens(folder / "train")
        share = config.mix.get(name, 1.0)
        shares = {int(step): float(x) for step, x in (share if isinstance(share, dict) else {0: share}).items()}
        weight = shares if split == "train" else max(shares.values())
        sources.append(Source(name, tokens(folder / split), weight, neighbours, memory, inlined))
    return sources


def first_run_id(folder: Path) -> str:
    """The tracking id of a run, kept from its first start on; an agent of a W&B sweep chooses it."""
    file = folder / "run_id"
    if not file.exists():
        of_agent = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
        file.write_text(of_agent or uuid.uuid4().hex[:8])
    return file.read_text().strip()


def announce(run: Run, parameters: int, repeated: int) -> None:
    """Say in a few lines what is about to happen."""
    e = run.config.engine
    engine = f"DeepSpeed ZeRO-{e.stage}" if e.kind == "deepspeed" else "DDP"
    ranks = f"{run.world.size} x {run.world.device.type}"
    print(f"model: {run.config.model.family}, {parameters:,} parameters; {engine}, {e.dtype}, {ranks}")
    if run.weights and not run.step:
        print(f"starting from {run.config.model.weights} ({run.weights})")
    if run.step:
        lost = f"; {repeated:.2e} FLOPs of steps after it are done again" if repeated else ""
        print(f"resuming at step {run.step} of {run.config.train.steps}{lost}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Ranks of a run as forked processes: torch and DeepSpeed are imported once, so that a start takes a second.

They run the real worker in a real process group; only the launcher is left out (tests/e2e goes through it).
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from mmtrain.config.compose import freeze, load_frozen
from mmtrain.train.checkpoint import fill, latest_checkpoint
from mmtrain.train.fragments import whole
from mmtrain.train.launch import free_port

Hook = Callable[[int], None]
"""Called in every rank, with its number, before the worker starts: what breaks."""
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.faults.preload"])


def copy_run(template: Path, name: str, **settings: Any) -> Path:
    """A run directory beside `template` with its data and configuration, not yet started.

    settings: by their whole names, with __ for the dots.
    """
    run = template.parent / name
    run.mkdir()
    shutil.copy(template / "artifacts.json", run)
    config = load_frozen(template / "config.yaml")
    config.name, config.track.wandb = name, "disabled"
    for key, value in settings.items():
        *sections, leaf = key.split("__")
        part: Any = config
        for section in sections:
            part = getattr(part, section)
        assert leaf in {field.name for field in dataclasses.fields(part)}, key
        setattr(part, leaf, value)
    freeze(config, run / "config.yaml")
    return run


def change(run: Path, **settings: Any) -> None:
    """Freeze the configuration of `run` anew with other settings, as continuing it with them does."""
    other = copy_run(run, f"{run.name}-changed", **settings)
    shutil.copy(other / "config.yaml", run)
    shutil.rmtree(other)


@dataclass
class Ranks:
    """Running ranks, their run directory and their output."""

    run: Path
    processes: list[Any]

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.processes[rank].pid, number)

    def wait(self, timeout: float = 60.0) -> list[int | None]:
        """Exit codes; None for a rank that has not ended by then."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def wait_for_step(self, step: int, timeout: float = 60.0) -> None:
        """Until a row of `step` or later is in metrics.jsonl."""
        deadline = time.monotonic() + timeout
        while not any(row["step"] >= step for row in logged(self.run)):
            assert time.monotonic() < deadline, f"never came to step {step}: {self.output()[-2000:]}"
            assert any(process.is_alive() for process in self.processes), self.output()[-3000:]
            time.sleep(0.002)

    def output(self) -> str:
        """What all ranks of all starts printed."""
        return "".join(file.read_text() for file in sorted(self.run.glob("output-*.txt")))


@contextlib.contextmanager
def started(run: Path, ranks: int = 2, hook: Hook | None = None, dies_together: bool = True) -> Iterator[Ranks]:
    """Start the worker of `run` on `ranks` ranks; nothing of it survives the block.

    dies_together: when one rank ends with an error, the others are killed after a moment, as launchers do.
    """
    port = free_port()
    processes = [_server.Process(target=_rank, args=(run, rank, ranks, port, hook)) for rank in range(ranks)]
    for process in processes:
        process.start()
    group = Ranks(run, processes)
    try:
        yield group
        if dies_together:
            group.wait(0.0)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
                process.kill()
            process.join()


def run_to_end(run: Path, ranks: int = 2, hook: Hook | None = None, timeout: float = 90.0) -> Ranks:
    """Start and wait; all ranks must end with code 0."""
    with started(run, ranks, hook) as group:
        codes = group.wait(timeout)
        assert codes == [0] * ranks, (codes, group.output()[-3000:])
    return group


def end_together(group: Ranks, timeout: float = 60.0, grace: float = 5.0) -> list[int | None]:
    """Wait for the first rank that fails, give the others a moment, kill them as a launcher does; exit codes."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and any(process.is_alive() for process in group.processes):
        if any(process.exitcode not in (None, 0) for process in group.processes):
            codes = group.wait(grace)
            for process in group.processes:
                process.kill()
            return codes
        time.sleep(0.01)
    return group.wait(0.0)


def _rank(run: Path, rank: int, size: int, port: int, hook: Hook | None) -> None:
    """In the forked process."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_PORT=str(port))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    number = len(list(run.glob(f"output-*-{rank}.txt")))
    out = os.open(run / f"output-{number}-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = ["worker", "--run-dir", str(run)]
    from mmtrain.train import loop, worker  # noqa: PLC0415

    loop.device_peak = lambda *_: None  # a second of matrix products
    if hook:
        hook(rank)
    code = worker.main()
    sys.stdout.flush()
    os._exit(code)


def logged(run: Path) -> list[dict[str, Any]]:
    """Whole rows of metrics.jsonl as they were written; a row that is just being written is left out."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def losses(run: Path) -> dict[int, dict[str, Any]]:
    """By step, what is last written of losses, tokens and gradient; a validation made up for has a row of its own."""
    names = ("loss", "loss_text", "loss_image", "loss_special", "val_loss", "grad_norm", "tokens", "lr", "flops_total")
    found: dict[int, dict[str, Any]] = {}
    for row in logged(run):
        found.setdefault(row["step"], {}).update({name: row[name] for name in names if name in row})
    return found


def state(run: Path) -> dict[str, Tensor]:
    """Parameters and moments of the newest checkpoint, whole, by KIND.NAME."""
    checkpoint, _ = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    import torch  # noqa: PLC0415

    kinds = set()
    for file in checkpoint.path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            kinds |= {key.partition(".")[0] for key in opened.keys()}  # noqa: SIM118
    parameters = {name: {kind: torch.empty(shape) for kind in kinds} for name, shape in checkpoint.shapes.items()}
    fill(checkpoint, whole(parameters))
    return {f"{kind}.{name}": tensor for name, tensors in parameters.items() for kind, tensor in tensors.items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


def compose(*hooks: Hook) -> Hook:
    """One hook of several."""
    return partial(_all, hooks)


def _all(hooks: Sequence[Hook], rank: int) -> None:
    for hook in hooks:
        hook(rank)

"""Start the processes of a run with the `deepspeed` launcher."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from mmtrain.config import Config, UserError

GRACE_SECONDS = 5.0


def launch(run_dir: Path, config: Config) -> int:
    """Train the run in `run_dir` on the configured processes; returns their exit code."""
    command, environment = launch_command(run_dir, config)
    process = subprocess.Popen(command, env=environment)
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)
        end_descendants()


def end_descendants() -> None:
    """End all processes below this one: the launcher leaves its workers behind when it is interrupted."""
    family = psutil.Process().children(recursive=True)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(family, GRACE_SECONDS)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _terminated(number: int, frame: object) -> None:
    sys.exit(128 + number)


def launch_command(run_dir: Path, config: Config) -> tuple[list[str], dict[str, str]]:
    """The launcher's command line and environment."""
    import torch  # noqa: PLC0415

    ranks = num_ranks(config)
    check_batch(config, ranks)
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # The worker must find this package also when it was started from a source checkout.
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (root, environment.get("PYTHONPATH")) if p)
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error"]
    if config.engine.hostfile:
        if not Path(config.engine.hostfile).is_file():
            raise UserError(f"engine.hostfile={config.engine.hostfile} does not exist; see launch/hostfile.example")
        if shutil.which("pdsh") is None:
            raise UserError("engine.hostfile needs pdsh on this machine: install it (Debian: apt-get install pdsh)")
        command += ["--hostfile", config.engine.hostfile, "--master_port", str(config.engine.master_port or 29500)]
    else:
        command += ["--num_gpus", str(ranks), "--hostfile", "/dev/null"]
        command += ["--master_addr", "127.0.0.1", "--master_port", str(config.engine.master_port or free_port())]
    return [*command, "--module", "mmtrain.train.worker", "--run-dir", str(run_dir.resolve())], environment


def num_ranks(config: Config) -> int:
    """Processes on this machine (on each host of a hostfile, the hostfile decides)."""
    import torch  # noqa: PLC0415

    if config.engine.ranks:
        return config.engine.ranks
    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


def check_batch(config: Config, ranks: int) -> None:
    """Raise UserError unless the global batch divides into ranks and micro-batches."""
    share, rest = divmod(config.stream.global_batch, ranks)
    if rest:
        raise UserError(
            f"stream.global_batch={config.stream.global_batch} does not divide into {ranks} ranks; "
            f"use a multiple of {ranks}, or engine.ranks="
        )
    if config.engine.micro_batch and share % config.engine.micro_batch:
        raise UserError(
            f"each of {ranks} ranks has {share} sequences per step, not a multiple of "
            f"engine.micro_batch={config.engine.micro_batch}"
        )


def free_port() -> int:
    """A TCP port that is free on the loopback interface right now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])

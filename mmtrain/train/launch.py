"""Start the processes of a run with the `deepspeed` launcher, and leave none of them behind."""

import contextlib
import ctypes
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from mmtrain.config import Config, UserError
from mmtrain.train.forward import SCRIPT, launcher_environment, write_environment
from mmtrain.train.hosts import PARENT, divides, read_hostfile, write_hostfile
from mmtrain.train.status import read_status
from mmtrain.train.stop import StopRequest, stop_when_orphaned

GRACE_SECONDS = 5.0
POLL_SECONDS = 1.0
ALONE_SECONDS = 30.0  # how long some hosts may go on when the part of another one has ended
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
WORKER = "mmtrain.train.worker"
# A host that vanished is noticed after a minute, and ssh never asks anything.
SSH_OPTIONS = "-o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4"


def launch(run_dir: Path, config: Config, hosts: dict[str, int], stop: StopRequest) -> int:
    """Train the run in `run_dir` once; returns the launcher's exit code when no process of it is left here.

    hosts: ranks by host, reached over ssh; empty: processes of this machine. Ends all processes when it is interrupted.
    """
    command, environment = launch_command(run_dir, config, hosts)
    if sys.platform == "linux":
        # The parts of a launcher that was killed become our children, which we can wait for and end.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # In a session of its own: Ctrl-C in the terminal and signals to our process group are ours to hand on.
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    guard = stop_when_orphaned(run_dir)
    try:
        code = _wait(process, len(hosts), run_dir, stop)
        if code < 0:
            time.sleep(1.0)  # what ended the launcher may be on its way to us, too
        while stop.asked and _family(run_dir):
            time.sleep(POLL_SECONDS)
        return code
    finally:
        # Not SIGTERM: the launcher would go and end all runs of this user on all hosts.
        process.kill()
        process.wait()
        end_descendants()
        guard.wait()
        (run_dir / SCRIPT).unlink(missing_ok=True)


def _wait(process: "subprocess.Popen[bytes]", hosts: int, run_dir: Path, stop: StopRequest) -> int:
    """The launcher's exit code; 1 when it goes on waiting for hosts whose workers wait for those of a lost one."""
    all_connected_at = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=POLL_SECONDS)
        stop.insist()
        missing = hosts - _ssh_sessions(process.pid) if hosts else 0
        if not missing:
            all_connected_at = time.monotonic()
        elif all_connected_at and time.monotonic() - all_connected_at > ALONE_SECONDS:
            status = read_status(run_dir)
            if status and status.state in ("finished", "stopped"):  # rank 0 may still be uploading
                continue
            print(f"mmtrain: the workers on {missing} of {hosts} hosts have ended, the others did not notice: ending "
                  "these", file=sys.stderr)  # fmt: skip
            return 1


def _ssh_sessions(launcher: int) -> int:
    """How many hosts pdsh is still connected to."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(launcher).children():
            if child.name().startswith("pdsh"):  # pdsh.bin on Debian
                return sum(session.status() != psutil.STATUS_ZOMBIE for session in child.children())
    return 0


def _family(run_dir: Path) -> list[psutil.Process]:
    """Processes of this run below this one; those that have ended are buried."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_ZOMBIE:
                psutil.wait_procs([process], timeout=0)
            elif str(run_dir.resolve()) in process.cmdline() and "--run-dir" in process.cmdline():
                found.append(process)
    return found


def end_descendants() -> None:
    """End all processes below this one: the launcher leaves its workers behind when it is interrupted."""
    family = psutil.Process().children(recursive=True)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(family, GRACE_SECONDS)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def launch_command(
    run_dir: Path, config: Config, hosts: dict[str, int], module: str = WORKER
) -> tuple[list[str], dict[str, str]]:
    """The launcher's command line and environment; for hosts, writes RUN/hostfile and a script with the environment.

    module: what each rank runs, with --run-dir.
    """
    import torch  # noqa: PLC0415

    run_dir = run_dir.resolve()
    per_host = max(hosts.values()) if hosts else num_ranks(config)
    environment = dict(os.environ) | dict([PARENT])
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // per_host)))
    # The worker must find this package also when it was started from a source checkout.
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (root, environment.get("PYTHONPATH")) if p)
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error"]
    if hosts:
        check_paths(run_dir, Path.cwd(), Path(sys.executable), *environment["PYTHONPATH"].split(os.pathsep))
        write_hostfile(run_dir / "hostfile", hosts)
        script = write_environment(run_dir, environment)
        environment = launcher_environment(environment)
        environment["PDSH_SSH_ARGS_APPEND"] = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}".strip()
        # force_multi: a single host is one of the hostfile, too, and not this machine.
        command += ["--hostfile", str(run_dir / "hostfile"), "--force_multi", "--venv_script", str(script)]
        command += ["--master_port", str(config.engine.master_port or 29500)]
    else:
        chosen = environment.pop("CUDA_VISIBLE_DEVICES", "") if torch.cuda.is_available() else ""
        command += ["--hostfile", "/dev/null", *_processes(per_host, chosen)]
        command += ["--master_addr", "127.0.0.1", "--master_port", str(config.engine.master_port or free_port())]
    return [*command, "--module", module, "--run-dir", str(run_dir)], environment


def _processes(ranks: int, chosen: str) -> list[str]:
    """Which devices the launcher gives to processes: it takes the first ones, whatever CUDA_VISIBLE_DEVICES says."""
    if not chosen:
        return ["--num_gpus", str(ranks)]
    devices = [device.strip() for device in chosen.split(",")]
    if not all(device.isdecimal() for device in devices) or ranks > len(devices):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={chosen} does not name {ranks} devices by their numbers, as in 0,1; set it so, or "
            "engine.ranks="
        )
    return ["--include", f"localhost:{','.join(devices[:ranks])}"]


def check_paths(*paths: Path | str) -> None:
    """Raise UserError for a path that DeepSpeed would write into the command line of ssh without quoting it."""
    for path in map(str, paths):
        if re.search(r"[^\w@%+=:,./-]", path):
            raise UserError(
                f"{path!r} holds a character that a remote shell reads as something else; on several hosts the run, "
                "the program and the current folder need paths of letters, digits and - _ . / only"
            )


def hosts_of(config: Config) -> dict[str, int]:
    """Ranks by host of engine.hostfile; empty without one. Raises UserError when the file or pdsh is missing."""
    if config.engine.hostfile is None:
        return {}
    hosts = read_hostfile(Path(config.engine.hostfile))
    for tool, package in (("pdsh", "pdsh"), ("ssh", "openssh-client")):
        if shutil.which(tool) is None:
            raise UserError(f"engine.hostfile needs {tool}: install it on this machine (apt-get install {package})")
    return hosts


def num_ranks(config: Config) -> int:
    """Processes of the whole run: the slots of the hostfile, engine.ranks, or what suits this machine."""
    import torch  # noqa: PLC0415

    if hosts := hosts_of(config):
        return sum(hosts.values())
    return config.engine.ranks or torch.cuda.device_count() or min(2, os.cpu_count() or 1)


def check_batch(config: Config, ranks: int) -> None:
    """Raise UserError unless the global batch divides into ranks and micro-batches."""
    if divides(config, ranks):
        return
    share, rest = divmod(config.stream.global_batch, ranks)
    if rest:
        raise UserError(
            f"stream.global_batch={config.stream.global_batch} does not divide into {ranks} ranks; "
            f"use a multiple of {ranks}, or engine.ranks="
        )
    raise UserError(
        f"each of {ranks} ranks has {share} sequences per step, not a multiple of "
        f"engine.micro_batch={config.engine.micro_batch}"
    )


def free_port() -> int:
    """A TCP port that is free on the loopback interface right now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])

"""What the doctor looks at between processes and hosts: interfaces, a port, a small all-reduce, W&B."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mmtrain.config import Config
from mmtrain.track import redact
from mmtrain.track.wandb_run import has_login, resolve_mode
from mmtrain.train.all_reduce import CONNECTED, DONE, FAILED, LIMIT_SECONDS, STARTED, Note, read_notes
from mmtrain.verbs.doctor_machine import Check
from mmtrain.verbs.doctor_storage import existing_parent

WHOLE_SECONDS = 2 * LIMIT_SECONDS + 60.0  # starting, connecting, summing
POLL_SECONDS, GRACE_SECONDS = 0.2, 3.0
WANDB_SECONDS = 40.0
CLOCK_SECONDS = 5.0  # by which clocks of hosts may differ
SUM = "mmtrain.train.all_reduce"
CHOSEN = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
WANDB_PROGRAM = "import wandb; print(wandb.Api(timeout=10).viewer.username)"
Program = tuple[list[str], dict[str, str]]
"""Command line and environment."""


def check_interfaces(config: Config) -> Iterator[Check]:
    """Network interfaces, those that the environment chooses, InfiniBand, NCCL."""
    import psutil
    import torch.distributed as dist

    stats, addresses = psutil.net_if_stats(), psutil.net_if_addrs()
    up = {
        name: next((a.address for a in addresses[name] if a.family in (socket.AF_INET, socket.AF_INET6)), "no address")
        for name, stat in stats.items()
        if stat.isup and name in addresses
    }
    if up:
        yield Check("interfaces", "pass", ", ".join(f"{name} {address}" for name, address in up.items()))
    else:
        yield Check("interfaces", "fail", "no network interface is up", "ip link set lo up")
    for variable in CHOSEN:
        wanted = [name.lstrip("^=") for name in os.environ.get(variable, "").split(",") if not name.startswith("^")]
        missing = [name for name in wanted if name and not any(there.startswith(name) for there in up)]
        if missing:
            mend = f"set {variable} to one of {', '.join(up)}, or unset it"
            yield Check("interfaces", "fail", f"{variable} names {', '.join(missing)}, which is not up here", mend)
    if not os.environ.get("GLOO_SOCKET_IFNAME"):
        try:
            socket.getaddrinfo(socket.gethostname(), None)
        except OSError as error:
            mend = f"add it to /etc/hosts, or set GLOO_SOCKET_IFNAME={next(iter(up), 'lo')}"
            problem = f"{socket.gethostname()} has no address ({error.strerror}), which gloo looks for"
            yield Check("host name", "warn", problem, mend)
    ports = list(_infiniband())
    if ports:
        active = [port for port, is_active in ports if is_active]
        mend = "" if active else "ask for the fabric's state: ibstat"
        detail = f"{len(active)} of {len(ports)} ports active: {', '.join(active or [port for port, _ in ports])}"
        yield Check("infiniband", "pass" if active else "warn", detail, mend)
    elif config.engine.hostfile and dist.is_nccl_available():
        mend = "expect the speed of the network; mmtrain plan says what it costs (plan.inter_node_gbps)"
        yield Check("infiniband", "warn", "none here: NCCL between hosts uses TCP", mend)
    if dist.is_nccl_available():
        import torch

        version = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "without a GPU here"
        yield Check("backend", "pass", f"NCCL {version}")
    else:
        yield Check("backend", "pass", "gloo (this build of torch has no NCCL)")


def _infiniband(devices: Path = Path("/sys/class/infiniband")) -> Iterator[tuple[str, bool]]:
    """DEVICE/PORT with its rate, and whether it is active."""
    for port in sorted(devices.glob("*/ports/*")):
        with contextlib.suppress(OSError):
            rate, state = ((port / name).read_text().strip() for name in ("rate", "state"))
            yield f"{port.parts[-3]}/{port.name} {rate}", "ACTIVE" in state


def check_port(config: Config) -> Iterator[Check]:
    """The rendezvous port on this host."""
    wanted = config.engine.master_port or (29500 if config.engine.hostfile else 0)
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("" if config.engine.hostfile else "127.0.0.1", wanted))
    except OSError as error:
        if not wanted:
            mend = "bring the loopback interface up: ip link set lo up"
            yield Check("port", "fail", f"no port on 127.0.0.1 can be taken ({error.strerror})", mend)
            return
        others = "engine.master_port=N of another number" + ("" if config.engine.hostfile else ", or 0 for a free one")
        where = "here; it must be free on the first host" if config.engine.hostfile else "here"
        status = "warn" if config.engine.hostfile else "fail"  # the first host of the file may be another one
        yield Check("port", status, f"{wanted} is taken {where} ({error.strerror})", others)
        return
    yield Check("port", "pass", f"{wanted} is free" if wanted else "a free one can be taken on 127.0.0.1")


def check_all_reduce(config: Config) -> Iterator[Check]:
    """A sum over all ranks as training would start them: of this machine, or of the hosts of engine.hostfile."""
    from mmtrain.train.hosts import end_workers
    from mmtrain.train.launch import free_port, hosts_of, launch_command, num_ranks

    listed = hosts_of(config)
    answering = end_workers(listed)
    for host in listed:
        if host not in answering:
            mend = f"mend that, or take it out of {config.engine.hostfile}"
            yield Check("host", "fail", f"{host} does not answer `ssh -o BatchMode=yes {host} true`", mend)
    hosts = {host: listed[host] for host in answering}
    if listed and not hosts:
        return
    ranks = sum(hosts.values()) or num_ranks(config)
    root = existing_parent(Path(config.root))
    with tempfile.TemporaryDirectory(prefix=".mmtrain-doctor-", dir=root) as scratch:
        folder = Path(scratch)
        if hosts:
            programs = [launch_command(folder, config, hosts, SUM)]
        else:
            port = config.engine.master_port or free_port()
            programs = [_local(folder, rank, ranks, port) for rank in range(ranks)]
        began = time.monotonic()
        said = _run(programs, folder)
        seconds = time.monotonic() - began
        end_workers(hosts)
        yield from judge(read_notes(folder), ranks, hosts, seconds, said)


def _local(folder: Path, rank: int, ranks: int, port: int) -> Program:
    """A rank of this machine."""
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p),
    }
    return [sys.executable, "-m", SUM, "--run-dir", str(folder)], environment


def _run(programs: list[Program], folder: Path) -> str:
    """Run them all until they end, one rank has failed, or time is up; the last line that they said."""
    import psutil

    end = time.monotonic() + WHOLE_SECONDS
    processes = []
    with open(folder / "output", "wb") as output:
        try:
            for command, environment in programs:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
                processes.append(process)
            while time.monotonic() < end and any(process.poll() is None for process in processes):
                time.sleep(POLL_SECONDS)
                if any(note.stage == FAILED for note in read_notes(folder).values()):
                    end = min(end, time.monotonic() + GRACE_SECONDS)  # the others would wait for it in vain
        finally:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    for child in psutil.Process(process.pid).children(recursive=True):
                        with contextlib.suppress(psutil.NoSuchProcess):
                            child.kill()
                process.kill()
                process.wait()
    lines = (folder / "output").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def judge(notes: dict[int, Note], ranks: int, hosts: dict[str, int], seconds: float, said: str) -> Iterator[Check]:
    """What the notes of the ranks mean; said: the last line of their output; seconds: what it all took."""
    done = [note for note in notes.values() if note.stage == DONE]
    name, of_what = "all-reduce", f"{ranks} ranks" + (f" on {', '.join(hosts)}" if hosts else " of this machine")
    if len(done) == ranks:
        slowest = max(done, key=lambda note: note.seconds)
        took = f"4 MiB summed in {1000 * slowest.seconds:.1f} ms ({seconds:.0f} s in all)"
        yield Check(name, "pass", f"{of_what}, {slowest.backend}: {took}")
        apart = max(note.time for note in done) - min(note.time for note in done)
        if hosts and apart > CLOCK_SECONDS:
            mend = "set them by NTP (timedatectl)"
            yield Check("clocks", "warn", f"those of the hosts differ by {apart:.0f} s", mend)
        return
    failed = [note for note in notes.values() if note.stage == FAILED]
    if failed:
        reason = f"rank {failed[0].rank} on {failed[0].host}: {redact(failed[0].reason)}"
        yield Check(name, "fail", f"{of_what}: {reason}", _MEND_NETWORK)
        return
    absent = [rank for rank in range(ranks) if rank not in notes]
    if absent:
        came = ", ".join(sorted({note.host for note in notes.values()})) or "none"
        detail = f"{of_what}: ranks {_numbers(absent)} did not start within {WHOLE_SECONDS:.0f} s (from: {came})"
        mend = "root=DIR must be one folder on all hosts" if hosts else "see whether the machine is overloaded"
        yield Check(name, "fail", f"{detail}{f'; {redact(said)}' if said else ''}", mend)
        return
    stuck = [note for note in notes.values() if note.stage in (STARTED, CONNECTED)]
    where = ", ".join(f"rank {note.rank} on {note.host} {note.stage}" for note in stuck[:8])
    yield Check(name, "fail", f"{of_what} have not summed 4 MiB within {seconds:.0f} s: {where}", _MEND_NETWORK)


_MEND_NETWORK = (
    "let the hosts reach each other on all ports (firewall), and choose the interface by GLOO_SOCKET_IFNAME and "
    "NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO says more"
)


def _numbers(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


def check_tracking(config: Config) -> Iterator[Check]:
    """Where W&B would write, and whether the server takes the key; no key leaves this function."""
    mode = resolve_mode(config.track.wandb)
    if mode == "disabled":
        yield Check("wandb", "pass", "disabled; metrics.jsonl is written in any case")
    elif mode == "offline":
        yield Check("wandb", "pass", "offline, files stay in the run folder (`mmtrain sync` uploads them)")
    elif not has_login():
        mend = "wandb login, or track.wandb=offline (metrics.jsonl is written in any case)"
        yield Check("wandb", "fail", "track.wandb=online, but no API key is set", mend)
    else:
        yield _ask_server()


def _ask_server() -> Check:
    """Whether the server knows the key; in a process of its own, with a time limit."""
    mend = "wandb login --relogin; WANDB_BASE_URL is the server; or track.wandb=offline"
    environment = os.environ | {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    try:
        words = [sys.executable, "-c", WANDB_PROGRAM]
        done = subprocess.run(words, capture_output=True, text=True, timeout=WANDB_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        problem = f"the server did not answer within {WANDB_SECONDS:.0f} s; runs would go on offline"
        return Check("wandb", "warn", problem, mend)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Check("wandb", "fail", f"the server does not take the key: {redact(reason)[:200]}", mend)
    return Check("wandb", "pass", f"online as {redact(done.stdout.strip().splitlines()[-1])}")

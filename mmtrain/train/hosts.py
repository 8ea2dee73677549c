"""The hosts of a run over ssh: the hostfile, who answers, how many ranks fit, and what is left over on them."""

import re
import shlex
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmtrain.config import Config, UserError

LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>\d+)")
HOST = re.compile(r"\w[\w.@-]*")  # a name that neither ssh nor pdsh takes for an option or for several hosts
CONNECT_SECONDS, ANSWER_SECONDS = 5, 15


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks by host, in the order of the file; raises UserError for a file that DeepSpeed would not or half read."""
    if not path.is_file():
        raise UserError(f"engine.hostfile={path} does not exist; see launch/hostfile.example")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        found = LINE.fullmatch(line)
        if not found or not HOST.fullmatch(found["host"]) or not int(found["slots"]):
            raise UserError(f"{path}, line {number}: {line[:80]!r} is not `HOST slots=NUMBER`, as in `node-1 slots=8`")
        if found["host"] in hosts:
            raise UserError(f"{path}, line {number}: {found['host']} is there twice; give all its slots in one line")
        hosts[found["host"]] = int(found["slots"])
    if not hosts:
        raise UserError(f"{path} names no host; give a line `HOST slots=NUMBER` for each")
    return hosts


def write_hostfile(path: Path, hosts: dict[str, int]) -> None:
    """The file that `read_hostfile` reads back as `hosts`."""
    path.write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()), encoding="utf-8")


def divides(config: Config, ranks: int) -> bool:
    """Whether the global batch divides into ranks and micro-batches."""
    share, rest = divmod(config.stream.global_batch, ranks)
    return not rest and not (config.engine.micro_batch and share % config.engine.micro_batch)


def fit(hosts: dict[str, int], config: Config) -> dict[str, int]:
    """As many ranks as the hosts have slots and divide the global batch, filling them in order; empty if none does."""
    left = next((ranks for ranks in range(sum(hosts.values()), 0, -1) if divides(config, ranks)), 0)
    chosen = {}
    for host, slots in hosts.items():
        if left:
            chosen[host] = min(slots, left)
            left -= chosen[host]
    return chosen


def answering(hosts: Iterable[str]) -> list[str]:
    """The hosts that run a command over ssh without asking anything, in the order given."""
    return [host for host, answers in _on_all(hosts, "true").items() if answers]


def end_workers(hosts: Iterable[str], run_dir: Path) -> None:
    """Kill what is left of a run on the hosts that answer: ssh leaves behind what it started.

    Only processes of this run directory; DeepSpeed's own way would end every run of this user on the hosts.
    """
    folder = re.sub(r"[.+]", r"[\g<0>]", str(run_dir.resolve()))
    # Brackets, so that the pattern does not match the remote shell that has it on its command line.
    _on_all(hosts, shlex.join(["pkill", "-KILL", "-f", f"[-]-run-dir {folder}( |$)"]))


def _on_all(hosts: Iterable[str], command: str) -> dict[str, bool]:
    """Run a shell command on all hosts at once; whether ssh reached the host (pkill is 1 when nothing matches)."""

    def run(host: str) -> bool:
        options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
        ssh = ["ssh", *options, host, command]
        try:
            done = subprocess.run(ssh, stdin=subprocess.DEVNULL, capture_output=True, timeout=ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    names = list(hosts)
    with ThreadPoolExecutor(max_workers=min(64, len(names) or 1)) as pool:
        return dict(zip(names, pool.map(run, names), strict=True))

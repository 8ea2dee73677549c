"""The hosts of a run over ssh: the hostfile, who answers, how many ranks fit, and what is left over on them."""

import re
import subprocess
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmtrain.config import Config, UserError

LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>\d+)")
HOST = re.compile(r"\w[\w.@-]*")  # a name that neither ssh nor pdsh takes for an option or for several hosts
PARENT = ("MMTRAIN_PARENT", uuid.uuid4().hex)  # the variable that marks the workers of this very process
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


def end_workers(hosts: Iterable[str]) -> list[str]:
    """Kill what this process has started on the hosts, since ssh leaves it behind; returns the hosts that answer.

    What is killed has PARENT in its environment: neither another run, which DeepSpeed's own way would end as well, nor
    this run when somebody else trains it. A host answers when it runs a command over ssh without asking anything.
    """
    found = f"grep -lsz '^{PARENT[0]}={PARENT[1]}$' /proc/[0-9]*/environ | cut -d / -f 3"
    command = f"for process in $({found}); do kill -KILL $process; done; true"

    def answers(host: str) -> bool:
        ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", host, command]
        try:
            done = subprocess.run(ssh, stdin=subprocess.DEVNULL, capture_output=True, timeout=ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    hosts = list(hosts)
    with ThreadPoolExecutor(max_workers=min(64, len(hosts) or 1)) as pool:
        return [host for host, answer in zip(hosts, pool.map(answers, hosts), strict=True) if answer]

"""Keep a run going: start it, see why it ended, start it again on the hosts that answer, give up when it is no use.

Every start and end is a line of RUN/attempts.jsonl.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from mmtrain.config import Config, UserError
from mmtrain.train.checkpoint import MANIFEST, NAME
from mmtrain.train.hosts import end_workers, fit
from mmtrain.train.launch import check_batch, hosts_of, launch, num_ranks
from mmtrain.train.status import Status, read_status
from mmtrain.train.stop import StopRequest

ATTEMPTS = "attempts.jsonl"
BACK_OFF_SECONDS, LONGEST_BACK_OFF_SECONDS = 5.0, 120.0
FINISHED, STOPPED, USER, HUNG, CRASHED, HOST_LOST = "finished", "stopped", "user", "hung", "crashed", "host lost"
CODES = {2: USER, 3: HUNG}  # exit codes of a worker that say why


def supervise(run_dir: Path, config: Config) -> str:
    """Train until the run has finished, was stopped, or has failed for good; returns the cause of the last end.

    A failure that is not the user's mistake is followed by another start, engine.restarts times, until
    engine.give_up_after in a row brought no new checkpoint. Causes: finished, stopped, user, hung, killed (SIGNAL),
    crashed, host lost.
    """
    listed = hosts_of(config)
    check_batch(config, num_ranks(config))
    silent = listed.keys() - set(end_workers(listed))
    if silent:
        raise UserError(
            f"{', '.join(sorted(silent))} of {config.engine.hostfile} does not answer `ssh -o BatchMode=yes HOST "
            "true`; mend that, or take the line out"
        )
    hosts, cause, restarts, fruitless = listed, CRASHED, 0, 0
    with StopRequest(run_dir) as stop:
        while True:
            before = newest_step(run_dir)
            cause = attempt(run_dir, config, hosts, stop) if hosts or not listed else HOST_LOST
            fruitless = 0 if newest_step(run_dir) > before else fruitless + 1
            if cause in (FINISHED, STOPPED, USER) or stop.asked or restarts == config.engine.restarts:
                return cause
            if fruitless >= config.engine.give_up_after:
                _say(f"{cause}; {fruitless} starts in a row ended without a new checkpoint: giving up")
                return cause
            stop.sleep(min(BACK_OFF_SECONDS * 2**fruitless, LONGEST_BACK_OFF_SECONDS))
            if stop.asked:
                return cause
            if listed:
                hosts = fit({host: listed[host] for host in end_workers(listed)}, config)
            restarts += 1
            _say(f"{cause}; restart {restarts} of {config.engine.restarts} {_where(hosts, listed, config)}")


def attempt(run_dir: Path, config: Config, hosts: dict[str, int], stop: StopRequest) -> str:
    """Train once; records start and end, and returns the cause of the end."""
    ranks = sum(hosts.values()) or num_ranks(config)
    before = read_status(run_dir)
    record(run_dir, "start", hosts, ranks)
    code, cause, ended = None, CRASHED, None
    try:
        code = launch(run_dir, config, hosts, stop)
        ended = time.time()
        status = read_status(run_dir)
        lost = bool(code) and len(end_workers(hosts)) < len(hosts)
        # Compared by content: the clock of the host that wrote it may be another one.
        cause = cause_of(code, status if status != before else None, lost)
    except SystemExit as error:  # a second signal
        cause = _killed(int(error.code or 0))
        end_workers(hosts)
        raise
    finally:
        record(run_dir, "end", hosts, ranks, code, cause, ended)
    return cause


def cause_of(code: int, status: Status | None, lost: bool = False) -> str:
    """Why an attempt ended: the launcher's exit code, what rank 0 said in it, if anything, and whether a host is gone.

    A code of 0 proves nothing: DeepSpeed's launcher also returns it when its own child was killed.
    """
    if status and status.state in (FINISHED, STOPPED):
        return status.state
    if code in CODES:
        return CODES[code]
    return HOST_LOST if lost else _killed(code)


def _killed(code: int) -> str:
    """`killed (SIGNAL)` for the exit code of a process that a signal ended, in any of its three spellings."""
    for number in (-code, 256 - code, code - 128):
        if number in set(signal.Signals):
            return f"killed ({signal.Signals(number).name})"
    return CRASHED


def newest_step(run_dir: Path) -> int:
    """Step of the newest complete checkpoint; 0 without one."""
    found = [NAME.fullmatch(file.parent.name) for file in run_dir.glob(f"checkpoints/step-*/{MANIFEST}")]
    return max((int(match[1]) for match in found if match), default=0)


def record(
    run_dir: Path,
    event: str,
    hosts: dict[str, int],
    ranks: int,
    code: int | None = None,
    cause: str | None = None,
    when: float | None = None,
) -> None:
    """Append a start or an end to RUN/attempts.jsonl; a start without an end was killed together with its parent.

    pid and host are those of this process: while it lives, an end may be followed by another start.
    """
    row: dict[str, Any] = {"event": event, "time": when or time.time(), "hosts": list(hosts), "ranks": ranks}
    row |= {"code": code, "cause": cause, "step": newest_step(run_dir)}
    row |= {"pid": os.getpid(), "host": socket.gethostname()}
    with open(run_dir / ATTEMPTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _where(hosts: dict[str, int], listed: dict[str, int], config: Config) -> str:
    if not listed:
        return f"on {num_ranks(config)} ranks"
    if not hosts:
        return "waits: no host answers"
    missing = [host for host in listed if host not in hosts]
    without = f", without {', '.join(missing)}" if missing else ""
    return f"on {sum(hosts.values())} ranks of {', '.join(hosts)}{without}"


def _say(sentence: str) -> None:
    print(f"mmtrain: {sentence}", file=sys.stderr, flush=True)

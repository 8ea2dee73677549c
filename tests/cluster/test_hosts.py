"""A run on two hosts over ssh equals one on a single host; it survives a lost host and a network that was cut."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.box import Box
from tests.cluster.conftest import (
    CHECKPOINT_EVERY,
    LIMIT_SECONDS,
    STEPS,
    assert_equal,
    left_over,
    log_of,
    losses,
    started,
    step_of,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(600)]
FAULT_AT = CHECKPOINT_EVERY + 3
WORKER = ["-m", "mmtrain.train.worker"]


def test_hosts_reach_each_other_unless_one_is_off_or_unplugged(box: Box) -> None:
    def answers(*words: str) -> bool:
        return subprocess.run(box.command("head", *words), capture_output=True, timeout=20).returncode == 0

    ssh = ("ssh", "-o", "ConnectTimeout=1", "node-2", "true")
    assert box.check("head", "ssh", "node-2", "hostname", "-I").split() == [box.address("node-2")]
    faults: list[tuple[Callable[[str], None], Callable[[str], None]]] = [
        (box.unplug, box.plug), (box.stop_ssh, box.start_ssh), (box.crash, box.power_on), (box.power_off, box.power_on),
    ]  # fmt: skip
    for fault, mended in faults:
        fault("node-2")
        assert not answers(*ssh)
        mended("node-2")
        assert answers(*ssh)


def test_two_hosts_compute_what_one_does(box: Box, straight: Path) -> None:
    run = straight.with_name("two-hosts")
    with started(box, run) as process:
        wait_for(lambda: step_of(run) > 1, "in training", process)
        workers = [sum(words[2:4] == WORKER for words in left_over(box, name).values()) for name in box.names]
        assert process.wait(LIMIT_SECONDS) == 0, log_of(run).read_text()
    assert workers == [0, 1, 1]
    assert_equal(run, straight)


def test_a_lost_host_ends_the_command_and_the_run_goes_on_later_through_a_cut_network(
    box: Box, straight: Path, table: Callable[..., None]
) -> None:
    run = straight.with_name("lost-host")
    with started(box, run) as process:
        wait_for(lambda: step_of(run) >= FAULT_AT, f"at step {FAULT_AT}", process)
        box.crash("node-2")
        lost = time.monotonic()
        assert process.wait(LIMIT_SECONDS) not in (0, 2)
        assert time.monotonic() - lost < 60
        assert not left_over(box, "head") and not left_over(box, "node-1")
        ended = time.monotonic() - lost
    last = step_of(run)
    assert last < STEPS

    box.power_on("node-2")
    with started(box, run) as process:
        again = time.monotonic()
        wait_for(lambda: f"resuming at step {CHECKPOINT_EVERY} " in log_of(run).read_text(), "resumed", process)
        recovery = time.monotonic() - again
        wait_for(lambda: step_of(run) >= 2 * FAULT_AT, f"at step {2 * FAULT_AT}", process)
        box.unplug("node-2")
        time.sleep(2)
        stuck = step_of(run)
        time.sleep(1)
        assert step_of(run) == stuck < STEPS
        box.plug("node-2")
        assert process.wait(LIMIT_SECONDS) == 0, log_of(run).read_text()
    assert_equal(run, straight)
    table(
        "a whole host of two crashes (kill -9 of all its processes, its network gone)",
        "the command ends, nothing is left on the other host; resumed when it is back (recovery with the launcher), "
        "it ends bit-equal",
        f"so, ended after {ended:.0f} s",
        recovery,
        last - CHECKPOINT_EVERY,
    )
    table(
        "network cut between hosts in a collective, healed after 3 s",
        "the ranks wait, then go on; bit-equal",
        "so",
        lost=0,
    )


def test_without_a_host_that_does_not_come_back_the_run_goes_on_by_itself_on_the_other(
    box: Box, straight: Path, table: Callable[..., None]
) -> None:
    run = straight.with_name("smaller")
    # A network that stays cut: the watchdog ends the ranks that wait, ssh notices after four seconds.
    impatient = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=2 -o ServerAliveCountMax=2"}
    with started(box, run, "engine.restarts=1", "health.step_seconds=5", **impatient) as process:
        wait_for(lambda: step_of(run) >= FAULT_AT, f"at step {FAULT_AT}", process)
        box.unplug("node-2")
        cut, last = time.monotonic(), step_of(run)
        wait_for(lambda: "on 1 ranks of node-1, without node-2" in log_of(run).read_text(), "started again", process)
        recovery = time.monotonic() - cut
        assert process.wait(LIMIT_SECONDS) == 0, log_of(run).read_text()
        wait_for(lambda: not left_over(box, "node-2"), "rid of the worker beyond the cut")
    found, expected = losses(run), losses(straight)
    assert found.keys() == expected.keys()
    assert all(found[step]["tokens"] == row["tokens"] for step, row in expected.items())
    # The same tokens in other sums, in bfloat16.
    assert all(found[step]["loss"] == pytest.approx(row["loss"], rel=1e-2) for step, row in expected.items())
    table(
        "network cut for good: a host that does not come back",
        "the run starts again by itself on the other host, with the same tokens",
        f"so, {recovery:.0f} s after the cut, at a limit of 5 s for a step",
        lost=last - CHECKPOINT_EVERY,
    )

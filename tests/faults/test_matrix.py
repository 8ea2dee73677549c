"""The fault matrix: what breaks, what is promised, what is seen. Every test adds its row to docs/reliability.md."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mmtrain
from mmtrain.config.randomness import random_stream
from mmtrain.track import goodput
from mmtrain.train.status import read_status
from tests.conftest import cannot
from tests.faults import breaking
from tests.faults.conftest import INTERVAL, STEPS
from tests.faults.ranks import (
    Ranks,
    change,
    compose,
    copy_run,
    end_together,
    equal,
    logged,
    losses,
    run_to_end,
    started,
    state,
)

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(600)]
STAGES = {"ddp": {"engine__kind": "ddp"}} | {
    f"zero{stage}": {"engine__stage": stage, "engine__dtype": "fp32"} for stage in range(4)
}
SAME = "ends bit-equal to an uninterrupted run, losses and state"
KILLS = int(os.environ.get("MMTRAIN_KILLS", "4"))  # per stage

Straight = Callable[..., Path]
Table = Callable[..., None]


def assert_same(run: Path, expected: Path) -> None:
    """Every step's losses, tokens and FLOPs, and the last state, bit for bit."""
    found, wanted = losses(run), losses(expected)
    assert found.keys() == wanted.keys()
    for step in wanted:
        assert found[step] == wanted[step], step
    assert equal(state(run), state(expected))


def resume(run: Path, ranks: int = 2) -> tuple[Ranks, float, int]:
    """Run to the end; also the seconds to the first new step, and the logged steps that were done again."""
    before = logged(run)
    begun = time.time()
    group = run_to_end(run, ranks)
    new = [row for row in logged(run)[len(before) :] if "loss" in row]  # not a validation that is made up for
    lost = max((row["step"] for row in before), default=0) - (new[0]["step"] - 1) if new else 0
    return group, (new[0]["time"] - begun if new else 0.0), lost


@pytest.mark.parametrize("rank", [0, 1])
def test_kill_of_a_rank(rank: int, template: Path, straight: Straight, table: Table) -> None:
    run = copy_run(template, f"kill-{rank}")
    with started(run, hook=breaking.at(13, rank, breaking.KILL)) as group:
        begun = time.monotonic()
        codes = end_together(group)
        seconds = time.monotonic() - begun
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] not in (0, None) and seconds < 30
    _, recovery, lost = resume(run)
    assert 0 <= lost <= INTERVAL
    assert_same(run, straight())
    account = goodput(run)
    assert account is not None and account.lost_steps == lost
    table(f"kill -9 of rank {rank}", f"the other ranks end; resumed, it {SAME}", "so", recovery, lost)


@pytest.mark.parametrize("stage", STAGES)
def test_kill_of_all_ranks_at_random_moments(stage: str, template: Path, straight: Straight, table: Table) -> None:
    """Anywhere: in a step, in a save, while it is written behind, in a validation."""
    last = 60
    settings = STAGES[stage] | {"train__checkpoint_every": 3, "train__keep_checkpoints": 2, "train__steps": last}
    run = copy_run(template, f"random-{stage}", **settings)
    draws = random_stream("kills", stage)
    for _ in range(KILLS):
        seen = max((row["step"] for row in logged(run)), default=0)
        if seen >= last - 25:  # from the start, to be killed more often
            shutil.rmtree(run / "checkpoints")
            (run / "metrics.jsonl").unlink()
            seen = 0
        with started(run, hook=breaking.slow_data(0, 0.02)) as group:
            group.wait_for_step(seen + 1)
            time.sleep(float(draws.random()) * 0.4)
            for rank in range(2):
                group.kill(rank)
            assert group.wait(10) == [-signal.SIGKILL] * 2
    _, recovery, lost = resume(run)
    assert lost <= 3 + 3  # a save that was under way does not count
    assert_same(run, straight(**settings))
    table(f"kill -9 of all ranks at {KILLS} random moments, {stage}", f"resumed, it {SAME}", "so", recovery, lost)


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 1)])
def test_signal_in_a_step(number: signal.Signals, rank: int, template: Path, straight: Straight, table: Table) -> None:
    run = copy_run(template, f"{number.name}-{rank}")
    with started(run, hook=breaking.at(13, rank, breaking.send(number))) as group:
        assert group.wait(30) == [0, 0], group.output()
    status = read_status(run)
    assert status is not None and (status.state, status.reason) == ("stopped", number.name)
    assert logged(run)[-1]["step"] == status.step <= 15  # the step of the signal, and one that was voted on before it
    _, recovery, lost = resume(run)
    assert lost == 0
    assert_same(run, straight())
    table(f"{number.name} to rank {rank} in a step", f"all ranks save and end with 0; it {SAME}", "so", recovery, lost)


@pytest.mark.parametrize("function", ["save", "evaluate"])
def test_signal_elsewhere(function: str, template: Path, straight: Straight, table: Table) -> None:
    run = copy_run(template, f"term-in-{function}")
    with started(run, hook=breaking.within(function, 1, breaking.TERM, after=8)) as group:
        assert group.wait(30) == [0, 0], group.output()
    status = read_status(run)
    assert status is not None and status.state == "stopped" and status.step <= 10
    _, recovery, lost = resume(run)
    assert lost == 0
    assert_same(run, straight())  # with the validation that was broken off
    table(f"SIGTERM in {function}", f"all ranks save and end with 0; it {SAME}", "so", recovery, lost)


def test_signal_to_every_process_of_the_job(template: Path, straight: Straight, table: Table) -> None:
    run = copy_run(template, "usr1-to-all", stream__workers=1, track__wandb="offline")
    hooks = [breaking.at(13, rank, breaking.send_to_all(signal.SIGUSR1)) for rank in range(2)]
    with started(run, hook=compose(*hooks)) as group:
        assert group.wait(30) == [0, 0], group.output()
    status = read_status(run)
    assert status is not None and (status.state, status.reason) == ("stopped", "SIGUSR1")
    _, recovery, lost = resume(run)
    assert lost == 0
    assert_same(run, straight())
    assert "W&B failed" not in group.output() and "W&B kept this run" in group.output()
    table("SIGUSR1 to all processes of all ranks", f"all ranks save and end with 0; it {SAME}", "so", recovery, lost)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_after_the_last_step(number: signal.Signals, template: Path, straight: Straight, table: Table) -> None:
    run = copy_run(template, f"late-{number.name}")
    run_to_end(run, hook=breaking.at_the_end(0, number))
    status = read_status(run)
    assert status is not None and status.state == "finished"
    assert_same(run, straight())
    table(f"{number.name} after the last step", "all ranks end with 0, marked as finished", "so", None, 0)


def test_the_stop_file(template: Path, table: Table) -> None:
    run = copy_run(template, "stop-file", train__steps=100_000)
    with started(run) as group:
        group.wait_for_step(5)
        (run / "stop").touch()
        assert group.wait(30) == [0, 0], group.output()
    status = read_status(run)
    assert status is not None and status.state == "stopped" and not (run / "stop").exists()
    table("the file RUN/stop appears", "all ranks save and end with 0", "so", None, 0)


@pytest.mark.parametrize("kind", ["tensors", "state.json", "MANIFEST.json", "deleted manifest"])
def test_damaged_checkpoint(kind: str, template: Path, straight: Straight, table: Table) -> None:
    run = copy_run(template, f"damaged-{kind.replace(' ', '-')}", train__steps=STEPS)
    with started(run, hook=breaking.at(18, 0, breaking.TERM)) as group:
        group.wait(30)
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    if kind == "deleted manifest":
        (newest / "MANIFEST.json").unlink()
    else:
        file = next(newest.glob(f"{kind}*"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    group, recovery, lost = resume(run)
    assert newest.name in group.output() and 0 < lost <= INTERVAL
    assert_same(run, straight())
    said = "named, the one before it used"
    table(f"checkpoint: {kind}{'' if 'deleted' in kind else ', one bit'}", f"{said}; it {SAME}", "so", recovery, lost)


def test_all_checkpoints_damaged(template: Path, table: Table) -> None:
    run = copy_run(template, "all-damaged", train__steps=INTERVAL)
    run_to_end(run)
    for manifest in run.glob("checkpoints/*/MANIFEST.json"):
        manifest.unlink()
    change(run, train__steps=STEPS)
    with started(run) as group:
        assert 2 in end_together(group)
    assert "no checkpoint under" in group.output() and logged(run)[-1]["step"] == INTERVAL
    table("all checkpoints damaged", "one sentence; never from step 0 in silence", "so")


def test_two_runs_in_one_directory(template: Path, straight: Straight, table: Table) -> None:
    run = copy_run(template, "two")
    with started(run, hook=breaking.slow_data(0, 0.5)) as first:
        first.wait_for_step(3)
        with started(run) as second:
            assert 2 in end_together(second)
        assert first.wait(60) == [0, 0]
    assert "another process is training in" in first.output()
    assert_same(run, straight())
    table("a second start in the same directory", "refused; the first goes on untouched", "so")


@pytest.mark.parametrize("stage", STAGES)
def test_nan_gradient_on_one_rank(stage: str, template: Path, table: Table) -> None:
    run = copy_run(template, f"nan-{stage}", **STAGES[stage])
    group = run_to_end(run, hook=breaking.at(10, 1, breaking.scale_backward(float("nan"))))
    last = logged(run)[-1]
    assert last["skipped_updates"] == 1 and last["loss"] is not None
    assert all(tensor.isfinite().all() for tensor in state(run).values())
    assert "step 11" in group.output()
    table(f"NaN gradient on one rank, {stage}", "the update is left out on all ranks, counted and said", "so")


def test_nan_that_stays(template: Path, table: Table) -> None:
    run = copy_run(template, "nan-stays", health__max_skipped=5)
    with started(run, hook=breaking.at(10, 0, breaking.scale_loss(float("nan"), 1000))) as group:
        assert 2 in end_together(group)
    assert "health.max_skipped" in group.output() and logged(run)[-1]["step"] <= 17
    assert all(tensor.isfinite().all() for tensor in state(run).values())
    table("NaN loss in every step from one on", "stops after health.max_skipped, with a sentence", "so")


def test_huge_gradient(template: Path, table: Table) -> None:
    run = copy_run(template, "huge")
    run_to_end(run, hook=breaking.at(10, 1, breaking.scale_backward(1e12)))
    rows = losses(run)
    assert rows[11]["grad_norm"] > 1e6 and rows[STEPS]["loss"] < rows[1]["loss"]
    assert all(tensor.isfinite().all() for tensor in state(run).values())
    table("gradient of one rank times 1e12", "clipped; training goes on", "so")


@pytest.mark.parametrize("policy", ["log", "skip", "rollback"])
def test_loss_spike(policy: str, template: Path, straight: Straight, table: Table) -> None:
    settings = {"health__spike": policy, "health__spike_window": 8, "train__steps": STEPS + 8}
    run = copy_run(template, f"spike-{policy}", **settings)
    group = run_to_end(run, hook=breaking.at(20, 1, breaking.scale_loss(1e3)))
    assert "spike" in group.output()
    rows = logged(run)
    assert rows[-1]["spikes"] == 1 and rows[-1]["step"] == STEPS + 8
    done_again = [row["step"] for row in rows].count(20)
    assert done_again == (2 if policy == "rollback" else 1)
    assert rows[-1].get("skipped_updates", 0) == (1 if policy == "skip" else 0)
    if policy == "rollback":
        assert json.loads((run / "ledger.json").read_text())["flops"]["repeated"] > 0
        newest = sorted((run / "checkpoints").glob("step-*"))[-1]
        assert json.loads((newest / "state.json").read_text())["health"]["skips"]["windows"]
    table(f"loss of a step times 1000, health.spike={policy}", "found, said, " + policy, "so")


def test_slow_rank(template: Path, table: Table) -> None:
    run = copy_run(template, "slow", track__log_every=4, stream__prefetch=0)
    group = run_to_end(run, hook=breaking.slow_data(1, 0.2))
    assert "rank 1 takes" in group.output() and "data" in group.output()
    assert "rank 0 takes" not in group.output()
    table("a rank that is slow in reading data", "named with its section", "so")


def test_hang(template: Path, straight: Straight, table: Table) -> None:
    run = copy_run(template, "hang", health__step_seconds=3.0, health__data_seconds=3.0)
    with started(run, hook=breaking.at(13, 1, breaking.sleep(1000))) as group:
        begun = time.monotonic()
        codes = group.wait(40)
        seconds = time.monotonic() - begun
    assert codes == [3, 3], (codes, group.output())
    stacks = (run / "logs" / "hang-rank-1.txt").read_text()
    assert "_sleep" in stacks and "rank 1" in group.output()
    _, recovery, lost = resume(run)
    assert lost <= INTERVAL
    assert_same(run, straight())
    promise = f"all ranks write their stacks and end within the limit; resumed, it {SAME}"
    table("a rank hangs, the others wait in a collective", promise, f"{seconds:.0f} s at 3 s", recovery, lost)


def test_disk_full(template: Path, straight: Straight, table: Table) -> None:
    """A file system of its own for the checkpoints, full from step 8 to step 16."""
    if os.geteuid() != 0:
        cannot("mounting a small file system needs root")
    run = copy_run(template, "full-disk")
    (run / "checkpoints").mkdir()
    size = sum(file.stat().st_size for file in straight().glob("checkpoints/*/*"))
    assert os.system(f"mount -t tmpfs -o size={3 * size},nr_inodes=0 tmpfs {run}/checkpoints") == 0
    try:
        with started(run) as group:
            group.wait_for_step(9)
            with open(run / "checkpoints" / "ballast", "wb", buffering=0) as ballast:
                try:
                    while True:
                        ballast.write(bytes(4096))
                except OSError:
                    pass
            group.wait_for_step(17)
            (run / "checkpoints" / "ballast").unlink()
            assert group.wait(60) == [0, 0], group.output()
        assert "step-00000016" in group.output()
        assert_same(run, straight())
    finally:
        os.system(f"umount {run}/checkpoints")
    table("disk full at a save", "said; training goes on, the next save is tried; no step lost", "so", None, 0)


def test_no_memory(template: Path, table: Table) -> None:
    run = copy_run(template, "no-memory")
    with started(run, hook=breaking.at(13, 0, breaking.no_memory)) as group:
        assert 2 in end_together(group)
    assert "out of memory when it asked for 800000000 bytes" in group.output() and "per rank" in group.output()
    table("out of memory in a step", "one sentence: what needs it, what to change; exit code 2", "so")


def test_clock_jump(template: Path, straight: Straight, table: Table) -> None:
    run = copy_run(template, "clock", health__step_seconds=5.0)
    hooks = [breaking.at(9, 0, breaking.clock(86_400.0)), breaking.at(12, 1, breaking.clock(-86_400.0))]
    run_to_end(run, hook=compose(*hooks))
    assert_same(run, straight())
    table("the clock jumps by a day, forth and back", "nothing happens", "so", None, 0)


def test_a_rank_that_is_stopped_and_goes_on(template: Path, straight: Straight, table: Table) -> None:
    run = copy_run(template, "sigstop")
    with started(run, hook=breaking.at(13, 1, breaking.STOP)) as group:
        group.wait_for_step(13)
        time.sleep(2)
        group.kill(1, signal.SIGCONT)
        assert group.wait(40) == [0, 0], group.output()
    assert_same(run, straight())
    table("a rank sleeps for a while (SIGSTOP, SIGCONT)", "the others wait; nothing is lost", "so", None, 0)


def test_a_rank_with_another_configuration(template: Path, table: Table) -> None:
    run, other = copy_run(template, "config-a"), copy_run(template, "config-b", optim__lr=0.5)
    with started(run, hook=breaking.other_run(1, other)) as group:
        assert 2 in end_together(group)
    assert "config.yaml" in group.output() and not logged(run) and "Traceback" not in group.output()
    table("a rank with another config.yaml", "refused before the first step, rank and host named", "so")


def test_a_rank_with_another_version(template: Path, tmp_path: Path, table: Table) -> None:
    shutil.copytree(Path(mmtrain.__file__).parent, tmp_path / "mmtrain")
    with open(tmp_path / "mmtrain" / "train" / "loop.py", "a") as file:
        file.write("# another version\n")
    run = copy_run(template, "version")
    with started(run, hook=breaking.other_code(1, tmp_path / "mmtrain")) as group:
        assert 2 in end_together(group)
    assert "mmtrain of fingerprint" in group.output() and not logged(run)
    table("a rank with another version of the program", "refused before the first step", "so")


def test_other_numbers_of_ranks_and_stages(template: Path, straight: Straight, table: Table) -> None:
    """4 ranks -> 2 -> 1 -> 4, and stage 3 -> 1 -> 0 -> 3."""
    run = copy_run(template, "elastic", engine__stage=3, engine__dtype="fp32")
    for ranks, stage, until in ((4, 3, 6), (2, 1, 12), (1, 0, 18), (4, 3, STEPS)):
        change(run, engine__stage=stage, engine__dtype="fp32")
        with started(run, ranks, breaking.at(until - 1, 0, breaking.TERM)) as group:
            assert group.wait(60) == [0] * ranks, group.output()
    found, wanted = losses(run), losses(straight(engine__stage=3, engine__dtype="fp32"))
    assert found.keys() == wanted.keys()
    worst = max(abs(found[step]["loss"] / wanted[step]["loss"] - 1) for step in wanted)
    assert worst <= 1e-5
    assert all(found[step]["tokens"] == wanted[step]["tokens"] for step in wanted)
    end, expected = state(run), state(straight(engine__stage=3, engine__dtype="fp32"))
    assert all(torch.allclose(end[name], expected[name], rtol=1e-3, atol=1e-5) for name in expected)
    promise = "the same tokens; losses within 1e-5"
    table("4 ranks, then 2, 1, 4; stage 3, then 1, 0, 3", promise, f"{worst:.1e}", None, 0)


def test_dry_run_changes_nothing(template: Path, straight: Straight) -> None:
    run = copy_run(template, "no-dry-run", train__dry_run=False)
    run_to_end(run)
    assert_same(run, straight())

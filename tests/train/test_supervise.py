"""A run that goes on by itself: restarts, hosts that are gone, giving up, stopping."""

import json
import multiprocessing
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from mmtrain.config import Config, UserError
from mmtrain.train import launch
from mmtrain.train import supervise as supervise_module
from mmtrain.train.checkpoint import MANIFEST
from mmtrain.train.status import Status, read_status, write_status
from mmtrain.train.supervise import cause_of, supervise

HOSTS = ["node-1", "node-2"]


def checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / MANIFEST).touch()


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]


class Script:
    """In place of launching: every attempt saves a step (0: none), says a state (or nothing) and ends with a code."""

    def __init__(self, run: Path, *attempts: tuple[int, str, int]) -> None:
        self.run, self.attempts, self.hosts = run, list(attempts), []  # type: ignore[var-annotated]

    def __call__(self, run_dir: Path, config: Config, hosts: dict[str, int], stop: Any) -> int:
        self.hosts.append(hosts)
        step, state, code = self.attempts.pop(0)
        if step:
            checkpoint(self.run, step)
        if state:
            write_status(self.run, state, step, "")
        return code


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Script]:
    monkeypatch.setattr(supervise_module, "BACK_OFF_SECONDS", 0.0)

    def script(*attempts: tuple[int, str, int]) -> Script:
        made = Script(tmp_path, *attempts)
        monkeypatch.setattr(supervise_module, "launch", made)
        return made

    return script


def config(restarts: int = 0) -> Config:
    made = Config()
    made.engine.ranks, made.engine.restarts, made.stream.global_batch = 2, restarts, 4
    return made


def test_a_run_that_fails_goes_on_until_it_is_finished(tmp_path: Path, scripted: Callable[..., Script]) -> None:
    scripted((3, "", 1), (6, "", 247), (9, "finished", 0))
    assert supervise(tmp_path, config(restarts=5)) == "finished"
    found = [(row["event"], row["step"], row["code"], row["cause"]) for row in rows(tmp_path)]
    assert found == [
        ("start", 0, None, None), ("end", 3, 1, "crashed"),
        ("start", 3, None, None), ("end", 6, 247, "killed (SIGKILL)"),
        ("start", 6, None, None), ("end", 9, 0, "finished"),
    ]  # fmt: skip


def test_it_restarts_as_often_as_it_may(tmp_path: Path, scripted: Callable[..., Script]) -> None:
    scripted((1, "", 1), (2, "", 3))
    assert supervise(tmp_path, config(restarts=1)) == "hung"


def test_it_gives_up_after_three_starts_without_a_checkpoint(
    tmp_path: Path, scripted: Callable[..., Script], capsys: pytest.CaptureFixture[str]
) -> None:
    script = scripted((0, "", 1), (0, "", 1), (5, "", 1), (0, "", 1), (0, "", 1), (0, "", 1), (9, "finished", 0))
    assert supervise(tmp_path, config(restarts=99)) == "crashed"
    assert len(script.attempts) == 1
    assert "3 starts in a row ended without a new checkpoint: giving up" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "code", "cause"), [("", 2, "user"), ("stopped", 0, "stopped"), ("stopped", -15, "stopped")]
)
def test_what_is_not_a_failure_is_not_restarted(
    state: str, code: int, cause: str, tmp_path: Path, scripted: Callable[..., Script]
) -> None:
    script = scripted((1, state, code), (2, "finished", 0))
    assert supervise(tmp_path, config(restarts=9)) == cause and script.attempts


def test_the_status_of_an_earlier_start_and_a_code_of_0_prove_nothing(
    tmp_path: Path, scripted: Callable[..., Script]
) -> None:
    write_status(tmp_path, "finished", 9, "")
    scripted((0, "", 0))
    assert supervise(tmp_path, config()) == "crashed"


@pytest.fixture
def reachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Which hosts answer, one list per question; afterwards all do."""
    answers: list[list[str]] = []

    def end_workers(hosts: Iterable[str]) -> list[str]:
        answer = answers.pop(0) if answers else HOSTS
        return [host for host in hosts if host in answer]

    monkeypatch.setattr(supervise_module, "hosts_of", lambda config: dict.fromkeys(HOSTS, 2))
    monkeypatch.setattr(supervise_module, "num_ranks", lambda config: 4)
    monkeypatch.setattr(supervise_module, "end_workers", end_workers)
    return answers


def test_it_goes_on_without_a_host_and_takes_it_back(
    tmp_path: Path, scripted: Callable[..., Script], reachable: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    reachable += [HOSTS, *[["node-2"]] * 3]  # before the first start, after it, before the second, after that
    script = scripted((1, "", 255), (2, "", 1), (3, "finished", 0))
    assert supervise(tmp_path, config(restarts=9)) == "finished"
    assert script.hosts == [{"node-1": 2, "node-2": 2}, {"node-2": 2}, {"node-1": 2, "node-2": 2}]
    assert [row["cause"] for row in rows(tmp_path)[1::2]] == ["host lost", "crashed", "finished"]
    assert "host lost; restart 1 of 9 on 2 ranks of node-2, without node-1" in capsys.readouterr().err


def test_without_any_host_it_asks_again_and_gives_up(
    tmp_path: Path, scripted: Callable[..., Script], reachable: list[list[str]]
) -> None:
    reachable += [HOSTS, *[[]] * 9]
    script = scripted((1, "", 255))
    assert supervise(tmp_path, config(restarts=9)) == "host lost" and len(script.hosts) == 1


def test_a_first_start_needs_all_hosts(tmp_path: Path, reachable: list[list[str]]) -> None:
    reachable += [["node-1"]]
    with pytest.raises(UserError, match="node-2 of .* does not answer"):
        supervise(tmp_path, config())


@pytest.mark.parametrize(
    ("code", "cause"),
    [(1, "crashed"), (2, "user"), (3, "hung"), (-9, "killed (SIGKILL)"), (137, "killed (SIGKILL)"),
     (241, "killed (SIGTERM)")],  # fmt: skip
)
def test_causes(code: int, cause: str) -> None:
    assert cause_of(code, None) == cause
    assert cause_of(code, Status("finished", 1, "", 0.0)) == "finished"


def test_a_status_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    (tmp_path / "status.json").write_text('{"state": ')
    assert read_status(tmp_path) is None
    write_status(tmp_path, "running", 3, "why")
    status = read_status(tmp_path)
    assert status and (status.state, status.step, status.reason) == ("running", 3, "why")


LAUNCHER = """
    import json, pathlib, signal, subprocess, sys, time
    run = pathlib.Path(sys.argv[-1])
    if sys.argv[1] == "launcher":  # what the real one does: starts a worker, and waits
        sys.exit(subprocess.call([sys.executable, __file__, "worker", "--run-dir", str(run)]))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def say(state):
        (run / "new").write_text(json.dumps({"state": state, "step": 7, "reason": "", "time": time.time()}))
        (run / "new").rename(run / "status.json")

    say("running")
    while not (run / "stop").exists() or not (run / "may-stop").exists():
        time.sleep(0.02)
    (run / "stop").unlink()
    say("stopped")
"""


@dataclass
class Parent:
    """A process that supervises a launcher and a worker, which obeys only RUN/stop, and only once there is may-stop."""

    run: Path
    process: multiprocessing.process.BaseProcess
    family: list[psutil.Process]

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid or 0, number)

    def end(self) -> tuple[int | None, str]:
        """Exit code and output."""
        self.process.join(30)
        return self.process.exitcode, (self.run / "output").read_text()


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parent]:
    (tmp_path / "launcher.py").write_text(textwrap.dedent(LAUNCHER))
    command = [sys.executable, "-S", str(tmp_path / "launcher.py"), "launcher", "--run-dir", str(tmp_path)]
    monkeypatch.setattr(launch, "launch_command", lambda *_: (command, None))
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.1)

    def run() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which is obeyed
        output = os.open(tmp_path / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.exit({"stopped": 0}.get(supervise(tmp_path, config()), 1))

    process = multiprocessing.get_context("fork").Process(target=run)  # spares the import of torch
    process.start()
    try:
        wait(lambda: read_status(tmp_path) is not None)
        yield Parent(tmp_path, process, psutil.Process(process.pid).children(recursive=True))
    finally:
        for member in psutil.Process(process.pid).children(recursive=True) if process.is_alive() else []:
            member.kill()
        process.kill()
        process.join()


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_the_workers_save(number: signal.Signals, parent: Parent) -> None:
    parent.send(number)
    wait((parent.run / "stop").exists)
    (parent.run / "may-stop").touch()
    code, output = parent.end()
    assert code == 0 and "stopping after this step, saving; press Ctrl-C again to end at once" in output
    assert not (parent.run / "stop").exists()


def test_a_request_that_a_starting_worker_took_for_an_old_one_is_repeated(parent: Parent) -> None:
    parent.send(signal.SIGTERM)
    wait((parent.run / "stop").exists)
    (parent.run / "stop").unlink()
    wait((parent.run / "stop").exists)


def test_a_second_signal_ends_everything_at_once(parent: Parent) -> None:
    parent.send(signal.SIGUSR1)  # the announcement of a time limit does not count
    wait((parent.run / "stop").exists)
    parent.send(signal.SIGTERM)
    parent.process.join(0.3)
    assert parent.process.is_alive()
    parent.send(signal.SIGTERM)
    assert parent.end()[0] == 128 + signal.SIGTERM
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in parent.family)
    assert rows(parent.run)[-1]["cause"] == "killed (SIGTERM)"


def test_workers_save_although_the_launcher_was_ended_by_the_same_signal(parent: Parent) -> None:
    for process in [psutil.Process(parent.process.pid), *parent.family]:
        process.terminate()
    parent.process.join(2.0)  # longer than what is left over may live
    (parent.run / "may-stop").touch()
    assert parent.end()[0] == 0
    assert rows(parent.run)[-1]["code"] == -signal.SIGTERM


def test_workers_stop_when_their_parent_was_killed(parent: Parent) -> None:
    (parent.run / "may-stop").touch()
    parent.process.kill()
    wait(lambda: "stopped" in (parent.run / "status.json").read_text())

"""Partitions on a local Ray: the same results, and nothing lost or done twice where processes are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmtrain.config import UserError
from mmtrain.verbs.partitions import run_partitions

pytestmark = pytest.mark.slow

WORK = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path

from mmtrain.config import UserError


@dataclass(frozen=True)
class Square:
    out: Path

    def __call__(self, task):
        number = task["number"]
        (self.out / f"started-{number}").open("a").write(f"{os.getpid()}\\n")
        if task.get("fail"):
            raise UserError("number 3 is no number")
        if task.get("kill") and not (self.out / "killed").exists():
            (self.out / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(task.get("seconds", 0))
        (self.out / f"{number}.tmp").write_text(str(number**2))
        (self.out / f"{number}.tmp").rename(self.out / f"{number}.txt")
        return {"documents": 1, "square": number**2}
"""


@pytest.fixture
def work(tmp_path, monkeypatch) -> Iterator[Any]:
    """An importable piece of work that writes a file per task into its folder `out`."""
    (tmp_path / "square_work.py").write_text(WORK)
    (tmp_path / "out").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sys.modules.pop("square_work", None)
    import square_work

    yield square_work.Square(tmp_path / "out")
    import ray

    ray.shutdown()


def test_a_killed_worker_loses_nothing_and_a_mistake_arrives_as_one(work, tmp_path):
    tasks = [{"number": i, "kill": i == 2} for i in range(5)]
    results = run_partitions(work, tasks, tmp_path / "done", "test", 2, runner="ray")
    assert results == [{"documents": 1, "square": i**2} for i in range(5)]
    assert results == run_partitions(work, tasks, tmp_path / "done2", "test", 2)
    started = [len((work.out / f"started-{i}").read_text().split()) for i in range(5)]
    assert started == [2, 2, 3, 2, 2]  # once by each runner, and once more after the kill
    with pytest.raises(UserError, match="^number 3 is no number$"):
        run_partitions(work, [{"number": 3, "fail": True}], None, "test", 2, runner="ray")


def test_a_killed_driver_goes_on_with_what_is_missing(work, tmp_path):
    driver, done = tmp_path / "driver.py", tmp_path / "done"
    driver.write_text(
        "from pathlib import Path\nfrom square_work import Square\n"
        "from mmtrain.verbs.partitions import run_partitions\n"
        "tasks = [{'number': i, 'seconds': 0 if i < 3 else 600} for i in range(5)]\n"
        f"run_partitions(Square(Path({str(work.out)!r})), tasks, Path({str(done)!r}), 'test', 2, runner='ray')\n"
    )
    process = subprocess.Popen([sys.executable, str(driver)], start_new_session=True)
    deadline = time.monotonic() + 90
    while len(list(done.glob("*.json"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    tasks = [{"number": i} for i in range(5)]
    results = run_partitions(work, tasks, done, "test", 2, runner="ray")
    assert [result["square"] for result in results] == [0, 1, 4, 9, 16]
    assert [len((work.out / f"started-{i}").read_text().split()) for i in range(3)] == [1, 1, 1]
    kept = sorted(json.loads(path.read_text())["square"] for path in done.glob("*.json"))
    assert kept == [0, 1, 4, 9, 16]

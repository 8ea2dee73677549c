"""Partitions on a Ray cluster of two hosts (on this machine), and on a Ray of this machine: as in local processes."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mmtrain import cli
from mmtrain.config import UserError
from mmtrain.verbs.partitions import run_partitions
from tests.verbs.test_prepare import descendants, is_running

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.faults

if os.environ.get("MMTRAIN_CI") != "1" and not importlib.util.find_spec("ray"):
    pytest.skip("ray is not installed here", allow_module_level=True)

DRIVER = """
import json, sys
from pathlib import Path
from tests.verbs.test_partitions_ray import run_slowly
print(json.dumps(run_slowly(Path(sys.argv[1]))))
"""


@pytest.fixture(scope="module")
def hosts():
    """Two hosts of one core each; only the second one has the resource "second"."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        yield cluster
        cluster.shutdown()


@pytest.fixture
def cluster(hosts, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", hosts.address)
    monkeypatch.chdir(tmp_path)
    return hosts


def append(path: Path, line: str) -> None:
    """In one write, which no other process's write tears apart."""
    with open(path, "ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


def square(task: dict) -> dict:
    number = task["number"]
    return {"documents": 1, "square": number**2, "host": "any", "threads": torch.get_num_threads(), "sum": 0.1 + number}


def killed_once(task: dict) -> dict:
    """Its path is relative to the folder of the command; the first of all tries of a number in `kill` is killed."""
    print("a word of the worker", flush=True)
    started, number = Path("started"), task["number"]
    append(started, str(number))
    if number in task["kill"] and started.read_text().split().count(str(number)) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    append(Path("ended"), str(number))
    return {"documents": 1, "number": number}


def killed_always(task: dict) -> dict:
    if task["number"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"documents": 1}


def mistaken(task: dict) -> dict:
    if task["number"] == 1:
        raise UserError("shard 1 is damaged; fetch it again")
    if task["number"] == 2:
        raise ZeroDivisionError("nothing")
    return {"documents": 1}


def slowly(task: dict) -> dict:
    append(Path(task["log"]), str(task["number"]))
    time.sleep(0.5)
    return {"documents": 1, "number": task["number"]}


def run_slowly(folder: Path) -> list[dict]:
    tasks = [{"number": number, "log": str(folder / "log")} for number in range(8)]
    return run_partitions(slowly, tasks, folder / "done", "slowly", 2, runner="ray")


def is_worker(pid: int) -> bool:
    """Whether it runs tasks, or may; agents of Ray's own stay for up to a minute when all else is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith((b"ray::_run_here", b"ray::IDLE"))
    return False


class OnGPU:
    """Work that uses a GPU where there is one."""

    uses_gpu = True

    def __call__(self, task: dict) -> dict:
        return {"documents": 1, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES", "")}


def numbered(count: int, **more) -> list[dict]:
    return [{"number": number, **more} for number in range(count)]


def test_results_are_those_of_processes_byte_by_byte(cluster, tmp_path: Path) -> None:
    tasks = numbered(12)
    results = [
        run_partitions(square, tasks, tmp_path / runner, "test", 2, limit, runner)
        for limit in (5, 0)
        for runner in ("processes", "ray")
    ]
    assert results[0] == results[1] and len(results[0]) == 5
    assert results[2] == results[3] and [r["square"] for r in results[3]] == [n**2 for n in range(12)]
    assert results[3][0]["threads"] == 1
    files = [{path.name: path.read_bytes() for path in (tmp_path / r).iterdir()} for r in ("processes", "ray")]
    assert files[0] == files[1] and len(files[0]) == 12


def test_a_killed_worker_is_counted_and_its_partition_done_once(cluster, tmp_path: Path, capfd) -> None:
    results = run_partitions(killed_once, numbered(10, kill=[2, 7]), tmp_path / "done", "test", 0, runner="ray")
    assert [result["number"] for result in results] == list(range(10))
    assert sorted(map(int, Path("ended").read_text().split())) == list(range(10))
    started = sorted(map(int, Path("started").read_text().split()))
    assert started == sorted([*range(10), 2, 7])
    captured = capfd.readouterr()
    assert "partition 2 again" in captured.out and "partition 7 again" in captured.out
    assert "2 partitions were done again after their workers were killed" in captured.out
    assert "a word of the worker" not in captured.out + captured.err


def test_a_partition_that_is_killed_every_time_ends_in_a_sentence_and_keeps_the_others(cluster, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="worker of partition 1 was killed 4 times .*data.processes"):
        run_partitions(killed_always, numbered(3), tmp_path, "test", 1, runner="ray")
    assert [path.name for path in tmp_path.iterdir()] == ["000000.json"]


def test_a_mistake_arrives_as_its_sentence(cluster, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^shard 1 is damaged; fetch it again$"):
        run_partitions(mistaken, numbered(2), None, "test", 2, runner="ray")
    with pytest.raises(UserError, match=r'^ZeroDivisionError \(nothing\) in the partition {"number": 2}'):
        run_partitions(mistaken, [{"number": 2}], None, "test", 2, runner="ray")


def test_a_host_that_dies_takes_no_partition_along(cluster, tmp_path: Path, capfd) -> None:
    host = cluster.add_node(num_cpus=2)
    is_gone = False

    def remove() -> None:
        nonlocal is_gone
        deadline = time.monotonic() + 60
        while not (tmp_path / "log").exists() or (tmp_path / "log").read_text().count("\n") < 4:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        cluster.remove_node(host, allow_graceful=False)
        is_gone = True

    thread = threading.Thread(target=remove)
    thread.start()
    tasks = numbered(10, log=str(tmp_path / "log"))
    results = run_partitions(slowly, tasks, tmp_path / "done", "test", 0, runner="ray")
    thread.join()
    assert is_gone and [result["number"] for result in results] == list(range(10))
    assert len(list((tmp_path / "done").iterdir())) == 10
    assert "were done again" in capfd.readouterr().out


def test_work_that_uses_a_gpu_gets_a_share_of_one(cluster, tmp_path: Path) -> None:
    assert run_partitions(OnGPU(), numbered(1), None, "test", 0, runner="ray") == [{"documents": 1, "gpu": ""}]
    host = cluster.add_node(num_cpus=3, num_gpus=2)
    try:
        results = run_partitions(OnGPU(), numbered(6), None, "test", 0, runner="ray")
        assert {result["gpu"] for result in results} <= {"0", "1"} and len(results) == 6
    finally:
        cluster.remove_node(host)


def test_a_stage_writes_the_bytes_that_processes_write(cluster, tmp_path: Path) -> None:
    words = ["experiment=smoke", "image_tokenizer.steps=2", "data.shard_documents=10", "corpus.num_documents=40"]
    assert cli.main(["data", *words, "data_dir=data", "data.processes=2"]) == 0
    whole = files_of(Path("data"))
    for folder in Path("data/shapes").glob("tokens-*"):
        folder.rename("old-tokens")
    assert cli.main(["data", *words, "data_dir=data", "runner=ray"]) == 0
    assert files_of(Path("data")) == whole
    assert cli.main(["data", "build", *words, "data_dir=other", "runner=ray"]) == 0
    documents = {name: content for name, content in whole.items() if name.startswith("documents-")}
    assert files_of(Path("other")) == documents and documents
    assert cli.main(["data", "verify", *words, "data_dir=data", "runner=ray"]) == 0


def files_of(data_dir: Path) -> dict[str, bytes]:
    """Documents and tokens."""
    folder = data_dir / "shapes"
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if name.startswith(("documents-", "tokens-"))}


def test_without_an_answer_at_the_address_it_is_a_sentence(monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(UserError, match="no Ray answers at RAY_ADDRESS=nonsense"):
        run_partitions(square, numbered(1), None, "test", 1, runner="ray")


def test_without_the_package_it_is_a_sentence(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'mmtrain\[ray\]'"):
        run_partitions(square, numbered(1), None, "test", 1, runner="ray")


def test_a_killed_command_leaves_no_worker_and_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    first = subprocess.Popen(command, cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("done/*.json"))) < 3:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = [pid for pid in descendants(first.pid) if is_worker(pid)]
    first.kill()
    first.wait()
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(workers) >= 2
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("done/*.json")}
    assert 3 <= len(kept) < 8
    (tmp_path / "log").unlink()

    second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    assert [result["number"] for result in json.loads(second.stdout.splitlines()[-1])] == list(range(8))
    assert {name: (tmp_path / "done" / name).stat().st_mtime_ns for name in kept} == kept
    missing = sorted(int(line) for line in (tmp_path / "log").read_text().split())
    assert missing == [number for number in range(8) if f"{number:06d}.json" not in kept]

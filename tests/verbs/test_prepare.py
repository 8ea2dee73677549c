"""Partitions: killed, in parallel, twice at once or damaged, a corpus becomes the same bytes or says why not."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtrain.config import UserError
from mmtrain.shards import DocumentShards
from mmtrain.verbs.build import cut_by_bytes
from mmtrain.verbs.partitions import run_partitions
from tests.verbs.conftest import NUM_TARS, SAMPLES_PER_TAR, SETTINGS, artifacts, data

ROOT = Path(__file__).parents[2]


def documents_of(cwd: Path) -> Path:
    (folder,) = cwd.glob("data/img2dataset/documents-*")
    return folder


def facts_of(cwd: Path) -> dict:
    return json.loads((documents_of(cwd) / "facts.json").read_text())


def in_child(action: Callable[[], int]) -> int:
    """Process id of a fork of this process that runs `action` and exits with its code."""
    pid = os.fork()
    if not pid:
        code = 70
        with contextlib.suppress(BaseException):
            code = action()
        os._exit(code)
    return pid


def kill_at(event_number: int) -> None:
    """SIGKILL this process when it makes, renames or removes its `event_number`th file or folder from now on."""
    seen = 0

    def hook(event: str, _: tuple) -> None:
        nonlocal seen
        if event not in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            return
        seen += 1
        if seen == event_number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_killed_at_many_moments_it_ends_with_the_bytes_of_an_undisturbed_build(
    tars: Path, undisturbed: Path, tmp_path: Path, capfd
) -> None:
    # The tokenizers hold how long their training took: they are taken over, and not what is looked at here.
    for path in (undisturbed / "data" / "img2dataset").glob("[ti][em]*-*"):
        shutil.copytree(path, tmp_path / "data" / "img2dataset" / path.name)
    kills = 0
    while True:
        event = 7 + 5 * kills

        def run(event: int = event) -> int:
            kill_at(event)
            return data("data.processes=1", path=tars, cwd=tmp_path)

        _, status = os.waitpid(in_child(run), 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        kills += 1
    assert kills >= 6
    assert f"reading img2dataset: {NUM_TARS} of {NUM_TARS} partitions were done before" in capfd.readouterr().out
    assert artifacts(tmp_path) == artifacts(undisturbed)


def test_any_number_of_processes_writes_the_same_and_none_outlives_a_killed_parent(
    tars: Path, undisturbed: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "mmtrain", "data", "build", *SETTINGS, f"corpus.path={tars}", "data.processes=3"]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("data/img2dataset/.documents-*/.work/read/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    workers = descendants(process.pid)
    process.kill()
    process.wait()
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(workers) >= 3
    assert not list(tmp_path.glob("data/img2dataset/documents-*"))

    for path in (undisturbed / "data" / "img2dataset").glob("[ti][em]*-*"):
        shutil.copytree(path, tmp_path / "data" / "img2dataset" / path.name)
    assert data("data.processes=2", path=tars, cwd=tmp_path) == 0
    assert artifacts(tmp_path) == artifacts(undisturbed)


def descendants(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [*children, *(grandchild for child in children for grandchild in descendants(child))]
    return []


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_two_builds_at_once_do_the_work_once(tars: Path, undisturbed: Path, tmp_path: Path, capfd) -> None:
    def build() -> int:
        return data("build", "data.processes=1", path=tars, cwd=tmp_path)

    pids = [in_child(build) for _ in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert documents_of(tmp_path).name == documents_of(undisturbed).name
    expected = {name: content for name, content in artifacts(undisturbed).items() if name.startswith("documents")}
    assert artifacts(tmp_path) == expected


def test_what_is_damaged_is_counted_and_everything_adds_up(tars: Path, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tars, copy)
    torn = copy / "00002.tar"
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    shutil.copy(copy / "00001.tar", copy / "00009.tar")  # every document of it once more
    limit = "corpus.max_bad_fraction=0.5"
    assert data("build", "data.processes=1", limit, path=copy, cwd=tmp_path) == 0
    facts = facts_of(tmp_path)
    parts, left_out = facts["partitions"], facts["left_out"]
    assert [part["read"] for part in parts] == [8, 8, parts[2]["read"], 8, 8, 8] and 0 < parts[2]["read"] < 8
    kept = facts["train"]["documents"] + facts["validation"]["documents"]
    assert facts["read"] == sum(part["read"] for part in parts) == kept + left_out["duplicates"]
    assert left_out == {"cleaned": 0, "duplicates": 8, "emptied": 0}
    assert facts["skipped"]["exact copy of an earlier document"] == 8
    shards = [DocumentShards(documents_of(tmp_path) / split) for split in ("train", "validation")]
    assert sum(map(len, shards)) == kept
    output = capsys.readouterr().out
    assert "left out 8: exact copy of an earlier document (first: img2dataset-" in output
    assert ": damaged tar (first: 00002.tar" in output

    # The limit is judged again when all is found, and what was read is not read again.
    assert data("build", "data.processes=1", "corpus.max_bad_fraction=0", path=copy, cwd=tmp_path) == 2
    assert "max_bad_fraction" in capsys.readouterr().err


def test_max_documents_takes_the_first_ones_whatever_the_number_of_processes(tars: Path, tmp_path: Path) -> None:
    for name, processes in (("one", 1), ("two", 2)):
        words = ("build", "corpus.max_documents=19", f"data.processes={processes}")
        assert data(*words, path=tars, cwd=tmp_path / name) == 0
    assert artifacts(tmp_path / "one") == artifacts(tmp_path / "two")
    facts = facts_of(tmp_path / "one")
    assert [part["documents"] for part in facts["partitions"]] == [8, 8, 3] and facts["read"] == 19
    folders = [documents_of(tmp_path / "one") / split for split in ("train", "validation")]
    texts = {text for folder in folders for document in DocumentShards(folder) for text in document.texts}
    assert texts == {f"picture {i % SAMPLES_PER_TAR} of tar {i // SAMPLES_PER_TAR}" for i in range(19)}


def test_near_duplicates_are_on_one_side_and_every_document_knows_its_cluster(undisturbed: Path) -> None:
    sides = [DocumentShards(documents_of(undisturbed) / split) for split in ("train", "validation")]
    clusters = [{document.meta["cluster"] for document in shards} for shards in sides]
    assert clusters[0].isdisjoint(clusters[1]) and sum(map(len, sides)) == NUM_TARS * SAMPLES_PER_TAR
    assert all(len(shards.manifest.shards) > 1 for shards in sides)  # else the tests above prove little


def test_a_failure_in_a_process_is_its_own_sentence(tars: Path, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tars, copy)
    torn = copy / "00002.tar"
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    assert data("build", "data.processes=2", "corpus.on_bad=fail", path=copy, cwd=tmp_path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "00002.tar" in error and "corpus.on_bad=skip" in error


def fail(task: dict) -> dict:
    if task.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if task.get("crash"):
        raise ZeroDivisionError("nothing")
    return {"documents": 1}


def test_a_killed_or_crashing_process_is_a_sentence_and_what_is_done_is_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="killed from outside.*data.processes=2"):
        run_partitions(fail, [{}, {"kill": True}, {}], None, "test", 2)
    with pytest.raises(UserError, match=r'ZeroDivisionError \(nothing\) in the partition {"crash": true}'):
        run_partitions(fail, [{}, {"crash": True}], tmp_path, "test", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["000000.json"]
    assert run_partitions(fail, [{"crash": True}, {}], tmp_path, "test", 1) == [{"documents": 1}] * 2  # not run again


FILES = ["*.tar", "*.index.npz", "manifest.json", "facts.json", "flops.json", "vocabulary.json", "checksums.json"]


@pytest.mark.parametrize("pattern", FILES)
def test_verify_names_every_file_with_a_flipped_byte(
    undisturbed: Path, tars: Path, tmp_path: Path, capsys, pattern: str
) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    changed = sorted((tmp_path / "data").rglob(pattern))[:3]
    for path in changed:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert changed and data("verify", "data.processes=1", path=tars, cwd=tmp_path) == 1
    output = capsys.readouterr().out
    assert all(str(path.relative_to(tmp_path)) in output for path in changed)


def test_verify_is_content_with_what_was_written(undisturbed: Path, tars: Path, tmp_path: Path, capsys) -> None:
    assert data("verify", "data.processes=1", path=tars, cwd=undisturbed) == 0
    assert data("verify", path=tars, cwd=tmp_path) == 2
    assert "nothing to verify" in capsys.readouterr().err


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 20))
def test_shards_are_cut_as_soon_as_they_are_full(sizes: list[int], shard_bytes: int) -> None:
    cuts = cut_by_bytes(np.array(sizes, np.int64), shard_bytes)
    assert [i for cut in cuts for i in range(cut["first"], cut["stop"])] == list(range(len(sizes)))
    assert [cut["number"] for cut in cuts] == list(range(len(cuts)))
    for cut in cuts:
        content = sizes[cut["first"] : cut["stop"]]
        assert content and sum(content[:-1]) < shard_bytes
        assert sum(content) >= shard_bytes or cut is cuts[-1]


def test_an_unknown_part_of_data_is_named(tars: Path, tmp_path: Path, capsys) -> None:
    assert data("tokenise", path=tars, cwd=tmp_path) == 2
    assert "did you mean `mmtrain data tokenize`?" in capsys.readouterr().err

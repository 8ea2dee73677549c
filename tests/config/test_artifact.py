import os
import threading
import time
from pathlib import Path

import pytest

from mmtrain.config import build_artifact, write_text_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_artifact_is_complete_or_invisible(tmp_path: Path) -> None:
    final = tmp_path / "below" / "a"

    def fail(partial: Path) -> None:
        (partial / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_artifact(final, fail)
    assert names(final.parent) == []
    build_artifact(final, lambda partial: write_text_atomic(partial / "whole", "whole"))
    assert names(final.parent) == ["a"] and names(final) == ["whole"]
    assert build_artifact(final, fail) == final


def test_what_a_resumable_build_left_is_handed_to_the_next_one(tmp_path: Path) -> None:
    def build(partial: Path) -> None:
        if not (partial / "first").exists():
            (partial / "first").write_text("1")
            (partial / ".second.0badcafe.tmp").write_text("killed while writing it")
            raise KeyboardInterrupt
        (partial / "second").write_text("2")

    with pytest.raises(KeyboardInterrupt):
        build_artifact(tmp_path / "a", build, resumable=True)
    assert names(tmp_path) == [".a.partial"]
    build_artifact(tmp_path / "a", build, resumable=True)
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["first", "second"]


@pytest.mark.parametrize("first_fails", [False, True])
def test_the_second_builder_waits_for_the_first(tmp_path: Path, capsys, first_fails: bool) -> None:
    inside: list[str] = []
    is_locked: list[bool] = []

    def build(partial: Path) -> None:
        inside.append("in")
        is_locked.append((tmp_path / ".a.lock").exists())  # for a third one
        assert inside[-2:] != ["in", "in"]
        deadline = time.monotonic() + 10
        while len(inside) == 1 and "waiting for another process" not in heard() and time.monotonic() < deadline:
            time.sleep(0.01)
        inside.append("out")
        if first_fails and len(inside) == 2:
            raise OSError("no luck")

    output: list[str] = []

    def heard() -> str:
        output.append(capsys.readouterr().out)
        return "".join(output)

    def run() -> None:
        if first_fails and not inside:
            with pytest.raises(OSError, match="no luck"):
                build_artifact(tmp_path / "a", build)
        else:
            build_artifact(tmp_path / "a", build)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
    for thread in threads:
        thread.join()
    assert inside == ["in", "out"] * (2 if first_fails else 1)
    assert all(is_locked)
    assert "waiting for another process" in heard()
    assert names(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == []

"""What every test shares: no settings leak in from the outside, GPU tests need a GPU, tools may be missing, and what
broke goes into the table of docs/reliability.md."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

# Before torch is imported anywhere: tests are small, and threads that fight for two cores make them slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    for item in items:
        if item.path.parent.name == "e2e":  # real runs, which wait for each other on a busy machine
            item.add_marker(pytest.mark.timeout(600))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def cannot(reason: str) -> NoReturn:
    """Skip for what this machine lacks; in the CI (MMTRAIN_CI=1), which must have it, fail."""
    if os.environ.get("MMTRAIN_CI") == "1":
        pytest.fail(f"the CI must be able to run this: {reason}")
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The developer's keys and settings must not change what a test sees, nor may a test reach W&B."""
    for name in ("WANDB_API_KEY", "MMTRAIN_CONFIG_DIR", "MMTRAIN_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    os.environ.pop("MMTRAIN_CONFIG_DIR", None)  # of an `mmtrain --config-dir` in this process


@pytest.fixture
def need_command() -> Callable[[str], None]:
    """`need_command("unshare")`: without that command the test skips, in the CI (MMTRAIN_CI=1) it fails."""

    def need(name: str) -> None:
        if shutil.which(name) is None:
            cannot(f"{name} is not installed here")

    return need


@pytest.fixture(scope="session")
def table() -> Iterator[Callable[..., None]]:
    """Adds a row to the table of faults, which is written to MMTRAIN_FAULT_REPORT if that is set."""
    rows: list[dict[str, Any]] = []

    def add(fault: str, promise: str, seen: str, recovery: float | None = None, lost: int | None = None) -> None:
        """recovery: seconds from the new start to the first step; lost: steps that were done again."""
        rows.append({"fault": fault, "promise": promise, "seen": seen, "recovery": recovery, "lost": lost})

    yield add
    if path := os.environ.get("MMTRAIN_FAULT_REPORT"):
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

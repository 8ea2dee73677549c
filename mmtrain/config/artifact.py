"""Artifacts: folders that are complete or invisible, named by the fingerprint of what made them."""

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

FINGERPRINT_LENGTH = 12


def fingerprint(*parts: Any) -> str:
    """12 hexadecimal digits of the SHA-256 of the canonical JSON of `parts` (dataclasses allowed)."""

    def plain(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return asdict(value)
        return str(value)

    text = json.dumps(parts, sort_keys=True, default=plain, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:FINGERPRINT_LENGTH]


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the whole new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """fsync a folder itself: the names in it, not what is in the files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """fsync every file below `folder`, then the folders themselves."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in [*names, ""]:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def build_artifact(final: Path, build: Callable[[Path], None], resumable: bool = False) -> Path:
    """Return `final`; when it is absent, let `build` fill the hidden folder `.NAME.partial` beside it and rename that.

    A folder under its final name is always complete. Only one process builds it at a time, the others wait and find
    it done. resumable: what an interrupted `build` left is handed to the next one, which must know what of it is
    whole; otherwise it is removed.
    """
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with _locked(final):
        if not final.is_dir():
            _build(final, build, resumable)
    return final


def _build(final: Path, build: Callable[[Path], None], resumable: bool) -> None:
    partial = final.with_name(f".{final.name}.partial")
    if not resumable:
        for leftover in final.parent.glob(f".{final.name}.*partial"):
            shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(exist_ok=resumable)
    try:
        build(partial)
        for leftover in partial.rglob(".*.tmp"):  # of write_text_atomic in an interrupted build
            leftover.unlink()
        sync_tree(partial)
        os.rename(partial, final)
    except BaseException:
        if not resumable:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(final.parent)


@contextmanager
def _locked(final: Path) -> Iterator[None]:
    """Keep other processes from building `final`; the kernel lets go when this one dies."""
    path = final.with_name(f".{final.name}.lock")
    while True:
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that builds {os.path.relpath(final)}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            # Who held it removed the file: the lock that counts is on the file that has the name now.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return

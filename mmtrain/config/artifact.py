"""Artifacts: folders that are complete or invisible, named by the fingerprint of what made them."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
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


def sync_tree(folder: Path) -> None:
    """fsync every file below `folder`, then the folders themselves."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in [*names, ""]:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def build_artifact(final: Path, build: Callable[[Path], None]) -> Path:
    """Return `final`; when it is absent, let `build` fill a folder beside it first and rename that.

    A folder under its final name is always complete. Left-overs of interrupted builds are hidden
    folders `.NAME.*.partial`; they are never read and are removed by the next build.
    """
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(f".{final.name}.*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir()
    try:
        build(partial)
        sync_tree(partial)
        os.rename(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return final

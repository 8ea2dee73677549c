"""A training state of a few hundred numbers, and savers that write it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmtrain.train.checkpoint import MANIFEST, STATE, sealed
from mmtrain.train.distributed import World
from mmtrain.train.fragments import PARAMETER, Fragment, shared_out, whole
from mmtrain.train.saving import Saver

ALONE = World(0, 1, torch.device("cpu"))
SHAPES = {"embedding": [16, 8], "block.weight": [8, 8], "norm": [8]}
KINDS = (PARAMETER, "exp_avg", "exp_avg_sq")
STATE_BYTES = 4 * len(KINDS) * (128 + 64 + 8)


def fragments(seed: int, rank: int = 0, size: int = 1) -> list[Fragment]:
    """What a rank owns of the state that belongs to a seed."""
    generator = torch.Generator().manual_seed(seed)
    states = {n: {kind: torch.randn(shape, generator=generator) for kind in KINDS} for n, shape in SHAPES.items()}
    return shared_out(whole(states), rank, size)


def save(folder: Path, step: int, keep: int = 10, keep_every: int = 0, **state: Any) -> Path:
    """The checkpoint of a step on one rank, written before this returns."""
    saver = Saver(folder, ALONE, keep, keep_every, asynchronous=False)
    saver.save(fragments(step), SHAPES, {"step": step, **state})
    assert saver.wait() is None
    return folder / f"step-{step:08d}"


def holds(held: list[Fragment], seed: int) -> bool:
    """Whether fragments hold the state that belongs to a seed, bit for bit."""
    expected = {f.name: f for f in fragments(seed)}
    return all(
        torch.equal(tensor, expected[f.name].tensors[kind][f.start : f.start + f.length])
        for f in held
        for kind, tensor in f.tensors.items()
    )


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest of a checkpoint as somebody would who also seals it anew."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(sealed(manifest)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


ONE_FILE = "tensors-00000-of-00001.safetensors"
FILES = (ONE_FILE, STATE, MANIFEST)

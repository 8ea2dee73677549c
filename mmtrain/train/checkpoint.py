"""Checkpoints: folders that are complete or invisible, safetensors and JSON only; `train.saving` writes them.

checkpoints/step-00000200/
    tensors-00003-of-00008.safetensors   what rank 3 of 8 owned: KIND.NAME, flat float32; where they start: metadata
    state.json                           step, tokens, stream, ledger, fingerprints, W&B run id
    MANIFEST.json                        shapes of the parameters, bytes and SHA-256 of the others and of itself
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmtrain.config import Config, UserError
from mmtrain.models import Decoder, build_model, num_positions
from mmtrain.train.distributed import World
from mmtrain.train.fragments import PARAMETER, Fragment, whole

Model = TypeVar("Model", bound=nn.Module)

MANIFEST = "MANIFEST.json"
STATE = "state.json"
FORMAT_VERSION = 2
NAME = re.compile(r"step-(\d{8,})")
HIDDEN = re.compile(r"\.step-\d{8,}\..+")
SHA256 = re.compile(r"[0-9a-f]{64}")
MOST_JSON_BYTES = 2**28
# What a file that somebody else wrote can make json, safetensors and our own look-ups raise.
DAMAGED = (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, its state and its manifest."""

    path: Path
    state: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shape of every parameter by name."""
        return self.manifest["shapes"]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def num_bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())


@dataclass(frozen=True)
class Piece:
    """Elements start .. start + length - 1 of a flattened tensor, in an open safetensors file."""

    start: int
    length: int
    file: Any


def tensors_name(rank: int, size: int) -> str:
    """The file of one rank."""
    return f"tensors-{rank:05d}-of-{size:05d}.safetensors"


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """`manifest` with the SHA-256 of its canonical JSON, so that no byte of it changes unseen."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return rest | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a folder; raises UserError unless it is whole. The files that it names are not looked at."""
    try:
        manifest = _read_json(path / MANIFEST)
        if manifest["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"checkpoint {path} has format {manifest['format_version']}; this version of mmtrain reads "
                f"{FORMAT_VERSION}: use the version that wrote it, or choose another name="
            )
        if manifest != sealed(manifest):
            raise ValueError(f"{MANIFEST} is not as it was written")
        _check_manifest(manifest)
    except DAMAGED as error:
        raise UserError(f"checkpoint {path} is incomplete or damaged ({_reason(error)}); delete the folder") from error
    return manifest


def _read_json(path: Path) -> Any:
    if path.stat().st_size > MOST_JSON_BYTES:
        raise ValueError(f"{path.name} is too large")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{Path(error.filename).name} is missing"
    return str(error) if isinstance(error, ValueError) else repr(error)


def _check_manifest(manifest: dict[str, Any]) -> None:
    def is_count(value: Any) -> bool:
        return type(value) is int and value >= 0

    files, shapes = manifest["files"], manifest["shapes"]
    if not is_count(manifest["step"]) or type(manifest["permanent"]) is not bool:
        raise ValueError("the step, or whether it is permanent, is no such value")
    float(manifest["time"])
    if not all(len(shape) < 8 and all(is_count(n) for n in shape) for shape in shapes.values()):
        raise ValueError("a shape is none")
    size = max(len(files) - 1, 1)
    if files.keys() != {STATE, *(tensors_name(rank, size) for rank in range(size))}:
        raise ValueError("its files are not one of each rank and the state")
    if not all(is_count(entry["bytes"]) and SHA256.fullmatch(entry["sha256"]) for entry in files.values()):
        raise ValueError("a size or a checksum is none")


def file_fault(path: Path, name: str, entry: dict[str, Any], hashed: bool = True) -> str | None:
    """What is wrong with a file of a checkpoint; entry: its bytes and SHA-256."""
    try:
        found = os.lstat(path / name)
        if not stat.S_ISREG(found.st_mode):
            return f"{name} is no plain file"
        if found.st_size != entry["bytes"]:
            return f"{name} has {found.st_size} bytes and not the {entry['bytes']} that its manifest says"
        if hashed:
            with open(path / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    return f"{name} is not what its manifest says"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint whose files have the right sizes, not hashed; raises UserError."""
    manifest = read_manifest(path)
    for name, entry in manifest["files"].items():
        if fault := file_fault(path, name, entry, hashed=False):
            raise UserError(f"checkpoint {path} is damaged: {fault}; delete the folder")
    try:
        state = _read_json(path / STATE)
        if state["step"] != manifest["step"]:
            raise ValueError(f"{STATE} is of step {state['step']}, {MANIFEST} of {manifest['step']}")
    except DAMAGED as error:
        raise UserError(f"checkpoint {path} is damaged ({_reason(error)}); delete the folder") from error
    return Checkpoint(path, state, manifest)


def read_checkpoint(path: Path, rank: int = 0, size: int = 1) -> Checkpoint:
    """A checkpoint whose files number rank, rank + size, ... were hashed; raises UserError naming a bad one."""
    checkpoint = open_checkpoint(path)
    for name in sorted(checkpoint.manifest["files"])[rank::size]:
        if fault := file_fault(path, name, checkpoint.manifest["files"][name]):
            raise UserError(f"checkpoint {path} is damaged: {fault}; delete the folder")
    return checkpoint


def latest_checkpoint(folder: Path, world: World | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a sentence for each newer one that does not.

    world: all ranks call, each hashes its share of the files, and all get the same answer. Raises UserError, on all,
    when there are checkpoints and none verifies: a run never restarts from 0 in silence.
    """
    world = world or World(0, 1, torch.device("cpu"))
    complaints: list[str] = []
    for name in world.gather([path.name for path in candidates(folder)])[0]:
        checkpoint, fault = None, None
        try:
            checkpoint = read_checkpoint(folder / name, world.rank, world.size)
        except UserError as error:
            fault = str(error)
        fault = next(filter(None, world.gather(fault)), None)
        if fault is None:
            return checkpoint, complaints
        complaints.append(fault)
    if complaints:
        raise UserError(f"no checkpoint under {folder} can be read: {complaints[0]}; or choose another name=")
    return None, complaints


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose manifest and sizes are right: nothing is hashed, so it takes no time."""
    for path in candidates(folder):
        with contextlib.suppress(UserError):
            return open_checkpoint(path)
    return None


def has_checkpoint(folder: Path) -> bool:
    """Whether there is any checkpoint, readable or not."""
    return bool(candidates(folder))


def candidates(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in folder.glob("step-*") if NAME.fullmatch(p.name) and p.is_dir()] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(path.name.removeprefix("step-"))


def removable(folder: Path, keep: int, last: int | None = None) -> list[Path]:
    """What is beyond the newest `keep` checkpoints, those kept for good not counted; newest first.

    last: step up to which they count: a newer one is one that this run could not read, and must not push out those
    that it writes. A folder that is not complete is left alone: its tensors may be all that somebody has.
    """
    ephemeral = []
    for path in candidates(folder):
        with contextlib.suppress(UserError):
            if (last is None or step_of(path) <= last) and not open_checkpoint(path).manifest["permanent"]:
                ephemeral.append(path)
    return ephemeral[keep:]


def discard(path: Path) -> None:
    """Remove a checkpoint; it becomes invisible first, so that no half of it is ever seen."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def open_pieces(
    path: Path, shapes: dict[str, list[int]], names: Iterable[str], stack: contextlib.ExitStack
) -> dict[str, list[Piece]]:
    """KIND.NAME -> its pieces in the files `names`, in order; `stack` closes the files.

    Raises UserError unless they are flat float32 and cover each of the tensors exactly, and every parameter is there.
    """
    pieces: dict[str, list[Piece]] = defaultdict(list)
    try:
        for name in names:
            file = stack.enter_context(safe_open(path / name, "pt"))
            starts = json.loads(file.metadata()["starts"])
            for key in file.keys():  # noqa: SIM118 (it has no __iter__)
                start, tensor = starts[key.partition(".")[2]], file.get_slice(key)
                shape = tensor.get_shape()
                if type(start) is not int or tensor.get_dtype() != "F32" or len(shape) != 1:
                    raise ValueError(f"{key} in {name} is no piece of a flat float32 tensor")
                pieces[key].append(Piece(start, shape[0], file))
    except DAMAGED as error:
        raise UserError(f"checkpoint {path} is damaged ({_reason(error)}); use another one") from error
    for key in pieces.keys() | {f"{PARAMETER}.{name}" for name in shapes}:
        name = key.partition(".")[2]
        pieces[key].sort(key=lambda piece: piece.start)
        end = 0
        for piece in pieces[key]:
            if piece.start != end:
                break
            end += piece.length
        if name not in shapes or end != math.prod(shapes[name]) or sum(p.length for p in pieces[key]) != end:
            raise UserError(
                f"checkpoint {path} is damaged: the pieces of {key} do not cover its shape {shapes.get(name)} exactly; "
                "use another one"
            )
    return pieces


def tensor_pieces(checkpoint: Checkpoint, stack: contextlib.ExitStack) -> dict[str, list[Piece]]:
    """`open_pieces` of all files of a checkpoint."""
    names = (name for name in checkpoint.manifest["files"] if name != STATE)
    return open_pieces(checkpoint.path, checkpoint.shapes, names, stack)


def read_range(pieces: list[Piece], key: str, start: int, out: Tensor) -> int:
    """Copy elements start .. of a flattened tensor into `out`, of which only the bytes needed are read.

    Returns how many of its elements there were.
    """
    filled = 0
    for piece in pieces:
        low, high = max(piece.start, start), min(piece.start + piece.length, start + out.numel())
        if low < high:
            out[low - start : high - start].copy_(piece.file.get_slice(key)[low - piece.start : high - piece.start])
            filled += high - low
    return filled


def fill(checkpoint: Checkpoint, fragments: list[Fragment]) -> None:
    """Copy from the checkpoint, written by any number of ranks, into every tensor of `fragments`."""
    with contextlib.ExitStack() as stack:
        pieces = tensor_pieces(checkpoint, stack)
        for f in fragments:
            for kind, tensor in f.tensors.items():
                key = f"{kind}.{f.name}"
                if read_range(pieces.get(key, []), key, f.start, tensor) != f.length:
                    raise UserError(
                        f"checkpoint {checkpoint.path} lacks elements of {key}: it is of another model or optimizer; "
                        "go on with the settings of its run, or choose another name="
                    )


def load_parameters(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All parameters by name, whole, float32 on the CPU."""
    with contextlib.ExitStack() as stack:
        tensor_pieces(checkpoint, stack)  # before memory is taken for shapes that no file vouches for
    tensors = {name: torch.empty(shape) for name, shape in checkpoint.shapes.items()}
    fill(checkpoint, whole({name: {PARAMETER: tensor} for name, tensor in tensors.items()}))
    return tensors


def load_model(checkpoint: Checkpoint, config: Config, vocabulary_size: int, vocabulary_fingerprint: str) -> Decoder:
    """The decoder of a checkpoint in float32, for sampling; raises UserError when vocabulary or shapes differ."""
    return load_into(build_model(config.model, vocabulary_size, num_positions(config)), checkpoint, vocabulary_fingerprint)


def load_into(model: Model, checkpoint: Checkpoint, vocabulary_fingerprint: str) -> Model:
    """As `load_model`, into a model that is there."""
    if checkpoint.state.get("vocabulary") != vocabulary_fingerprint:
        raise UserError(
            f"checkpoint {checkpoint.path} was trained with another vocabulary ({checkpoint.state.get('vocabulary')}, "
            f"here {vocabulary_fingerprint}); use the tokenizers of its run"
        )
    check_tensors(checkpoint, model)
    model.load_state_dict(load_parameters(checkpoint), strict=False)
    return model.eval()


def check_tensors(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Raise UserError unless the checkpoint has the parameters of `model`, of the same shapes, and no others."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: tuple(shape) for name, shape in checkpoint.shapes.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"checkpoint {checkpoint.path} is of another model: {name} has shape {found.get(name)}, "
                f"the config asks for {expected.get(name)}"
            )

"""Checkpoints: folders that are complete or invisible, safetensors and JSON only.

checkpoints/step-00000200/
    tensors-00003-of-00008.safetensors   what rank 3 of 8 owned: parameter.NAME and moments, flat float32 pieces
    state.json                           step, tokens, stream, ledger, fingerprints, W&B run id
    MANIFEST.json                        shapes of the parameters, bytes and SHA-256 of the others; written last
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmtrain.config import Config, UserError, sync_folder, sync_tree, write_text_atomic
from mmtrain.models import Decoder, build_model, num_positions
from mmtrain.train.distributed import World
from mmtrain.train.fragments import PARAMETER, Fragment, whole

MANIFEST = "MANIFEST.json"
STATE = "state.json"
FORMAT_VERSION = 2
NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder and its state."""

    path: Path
    state: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shape of every parameter by name."""
        return self.manifest["shapes"]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def save_checkpoint(
    folder: Path,
    fragments: list[Fragment],
    shapes: dict[str, list[int]],
    state: dict[str, Any],
    world: World,
    keep: int,
) -> Path:
    """Write `folder/step-N` and drop all but the newest `keep` up to it; every rank writes its fragments.

    All ranks must call. Raises UserError on all when the disk of one is too small or fails; what was there before is
    then still there.
    """
    final = folder / f"step-{state['step']:08d}"
    partial = final.with_name(f".{final.name}.partial")
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    name = f"tensors-{world.rank:05d}-of-{world.size:05d}.safetensors"
    entry, failure = None, None
    try:
        needed = sum(t.numel() * t.element_size() for f in fragments for t in f.tensors.values())
        free = shutil.disk_usage(folder).free
        if free < needed * 1.05:
            raise OSError(f"it needs {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free")
        named = {f"{kind}.{f.name}": tensor for f in fragments for kind, tensor in f.tensors.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
        save_file(tensors, partial / name, {"starts": json.dumps({f.name: f.start for f in fragments})})
        entry = describe(partial / name)
    except (OSError, SafetensorError) as error:
        failure = f"{error} (rank {world.rank})"
    entries = world.gather((name, entry, failure))
    failure = next((sentence for _, _, sentence in entries if sentence), None)
    if world.rank == 0 and not failure:
        try:
            (partial / STATE).write_text(json.dumps({"format_version": FORMAT_VERSION, **state}))
            files = {name: entry for name, entry, _ in entries} | {STATE: describe(partial / STATE)}
            manifest = {"format_version": FORMAT_VERSION, "step": state["step"], "shapes": shapes, "files": files}
            write_text_atomic(partial / MANIFEST, json.dumps(manifest, indent=1))
            sync_tree(partial)
            if final.exists():
                shutil.rmtree(final)
            os.rename(partial, final)
            sync_folder(folder)
        except OSError as error:
            failure = str(error)
    failure = world.gather(failure)[0]
    if failure:
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"checkpoint {final} could not be written ({failure}); free some space or move root=, then run the same "
            "command again"
        )
    # A newer one is one that this run could not read; it must not push out the one just written.
    for old in [path for path in _candidates(folder) if path.name <= final.name][keep:] if world.rank == 0 else []:
        shutil.rmtree(old)
    return final


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify every file against the manifest; raises UserError naming the file that does not match."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"checkpoint {path} has format {manifest['format_version']}; this version of mmtrain reads "
                f"{FORMAT_VERSION}: use the version that wrote it, or choose another name="
            )
        for name, entry in manifest["files"].items():
            if Path(name).name != name or not (path / name).is_file() or describe(path / name) != entry:
                raise UserError(
                    f"checkpoint {path} is damaged: {name} is not what its manifest says; delete the folder"
                )
        return Checkpoint(path, json.loads((path / STATE).read_text()), manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path} is incomplete or damaged ({error!r}); delete the folder") from error


def latest_checkpoint(folder: Path, world: World | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a sentence for each newer one that does not.

    Raises UserError when there are checkpoints and none verifies: a run never restarts from 0 in silence.
    """
    complaints: list[str] = []
    for path in _candidates(folder):
        try:
            return read_checkpoint(path), complaints
        except UserError as error:
            complaints.append(str(error))
    if complaints:
        raise UserError(f"no checkpoint under {folder} can be read: {complaints[0]}; or choose another name=")
    return None, complaints


def fill(checkpoint: Checkpoint, fragments: list[Fragment]) -> None:
    """Copy from the checkpoint, written by any number of ranks, into every tensor of `fragments`."""
    with contextlib.ExitStack() as stack:
        pieces = _pieces(checkpoint, stack)
        for f in fragments:
            for kind, tensor in f.tensors.items():
                filled = 0
                for start, length, file in pieces[f.name]:
                    low, high = max(start, f.start), min(start + length, f.start + f.length)
                    if low < high:
                        part = file.get_slice(f"{kind}.{f.name}")[low - start : high - start]
                        tensor[low - f.start : high - f.start].copy_(part)
                        filled += high - low
                if filled != f.length:
                    raise UserError(
                        f"checkpoint {checkpoint.path} has {filled} of {f.length} elements of {kind}.{f.name}; "
                        "use another checkpoint"
                    )


def _pieces(checkpoint: Checkpoint, stack: contextlib.ExitStack) -> dict[str, list[tuple[int, int, Any]]]:
    """By parameter: (start, length, open file) of every fragment."""
    pieces: dict[str, list[tuple[int, int, Any]]] = {name: [] for name in checkpoint.shapes}
    for name in checkpoint.manifest["files"]:
        if name != STATE:
            file = stack.enter_context(safe_open(checkpoint.path / name, "pt"))
            for parameter, start in json.loads((file.metadata() or {})["starts"]).items():
                length = file.get_slice(f"{PARAMETER}.{parameter}").get_shape()[0]
                pieces[parameter].append((start, length, file))
    return pieces


def load_parameters(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All parameters by name, whole, float32 on the CPU."""
    tensors = {name: torch.empty(shape) for name, shape in checkpoint.shapes.items()}
    fill(checkpoint, whole({name: {PARAMETER: tensor} for name, tensor in tensors.items()}))
    return tensors


def load_model(checkpoint: Checkpoint, config: Config, vocabulary_size: int, vocabulary_fingerprint: str) -> Decoder:
    """The model of a checkpoint in float32, for sampling; raises UserError when vocabulary or shapes differ."""
    if checkpoint.state["vocabulary"] != vocabulary_fingerprint:
        raise UserError(
            f"checkpoint {checkpoint.path} was trained with another vocabulary ({checkpoint.state['vocabulary']}, "
            f"here {vocabulary_fingerprint}); use the tokenizers of its run"
        )
    model = build_model(config.model, vocabulary_size, num_positions(config))
    check_tensors(checkpoint, model)
    model.load_state_dict(load_parameters(checkpoint), strict=False)
    return model.eval()


def check_tensors(checkpoint: Checkpoint, model: Decoder) -> None:
    """Raise UserError unless the checkpoint has the parameters of `model`, of the same shapes, and no others."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: tuple(shape) for name, shape in checkpoint.shapes.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"checkpoint {checkpoint.path} is of another model: {name} has shape {found.get(name)}, "
                f"the config asks for {expected.get(name)}"
            )


def has_checkpoint(folder: Path) -> bool:
    """Whether there is any checkpoint, readable or not."""
    return bool(_candidates(folder))


def _candidates(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: p.name, reverse=True)


def describe(path: Path) -> dict[str, Any]:
    """Bytes and SHA-256 of a file, as the manifest has them."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

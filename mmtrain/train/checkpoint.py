"""Checkpoints: folders that are complete or invisible, safetensors and JSON only.

checkpoints/step-00000200/
    model.safetensors       float32 parameters by name
    optimizer.safetensors   exp_avg.NAME, exp_avg_sq.NAME
    state.json              step, tokens, stream, ledger, fingerprints, W&B run id
    MANIFEST.json           bytes and SHA-256 of the others; written last
"""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mmtrain.config import Config, UserError, build_artifact
from mmtrain.models import Decoder, build_model, num_positions

MANIFEST = "MANIFEST.json"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
FORMAT_VERSION = 1
NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder and its state."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def save_checkpoint(
    folder: Path,
    parameters: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step-N` and drop all but the newest `keep` up to it.

    Raises UserError when the disk is too small or fails; what was there before is then still there.
    """
    tensors = [*parameters.values(), *moments.values()]
    needed = sum(t.numel() * t.element_size() for t in tensors)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed * 1.05:
        raise UserError(
            f"no room for a checkpoint in {folder}: it needs {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free; "
            "free some space or move root=, then run the same command again"
        )

    def build(partial: Path) -> None:
        save_file(parameters, partial / "model.safetensors")
        save_file(moments, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps({"format_version": FORMAT_VERSION, **state}))
        sizes = {name: (partial / name).stat().st_size for name in FILES}
        files = {name: {"bytes": size, "sha256": _sha256(partial / name)} for name, size in sizes.items()}
        (partial / MANIFEST).write_text(json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=1))

    final = folder / f"step-{state['step']:08d}"
    if final.exists():
        shutil.rmtree(final)
    try:
        build_artifact(final, build)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {final} could not be written ({error}); free some space or move root=, then run the same "
            "command again"
        ) from error
    # A newer one is one that this run could not read; it must not push out the one just written.
    for old in [path for path in _candidates(folder) if path.name <= final.name][keep:]:
        shutil.rmtree(old)
    return final


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify every file against the manifest; raises UserError naming the file that does not match."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        for name in FILES:
            file, entry = path / name, files[name]
            if not file.is_file() or file.stat().st_size != entry["bytes"] or _sha256(file) != entry["sha256"]:
                raise UserError(
                    f"checkpoint {path} is damaged: {name} is not what its manifest says; delete the folder"
                )
        return Checkpoint(path, json.loads((path / "state.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path} is incomplete or damaged ({error!r}); delete the folder") from error


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
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


def load_tensors(checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters and moments, float32 on the CPU."""
    return load_file(checkpoint.path / "model.safetensors"), load_file(checkpoint.path / "optimizer.safetensors")


def load_model(checkpoint: Checkpoint, config: Config, vocabulary_size: int, vocabulary_fingerprint: str) -> Decoder:
    """The model of a checkpoint in float32, for sampling; raises UserError when vocabulary or shapes differ."""
    if checkpoint.state["vocabulary"] != vocabulary_fingerprint:
        raise UserError(
            f"checkpoint {checkpoint.path} was trained with another vocabulary ({checkpoint.state['vocabulary']}, "
            f"here {vocabulary_fingerprint}); use the tokenizers of its run"
        )
    model = build_model(config.model, vocabulary_size, num_positions(config))
    check_tensors(checkpoint, model)
    model.load_state_dict(load_file(checkpoint.path / "model.safetensors"), strict=False)
    return model.eval()


def check_tensors(checkpoint: Checkpoint, model: Decoder) -> None:
    """Raise UserError unless the checkpoint has the parameters of `model`, of the same shapes, and no others."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    try:
        with safe_open(checkpoint.path / "model.safetensors", "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"checkpoint {checkpoint.path} cannot be read: {error}") from error
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


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

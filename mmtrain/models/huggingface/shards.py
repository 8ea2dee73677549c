"""Tensors in safetensors files of limited size, with an index where there are several; streamed both ways."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmtrain.config import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PICKLED = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.pkl", "consolidated.*")
MAX_JSON_BYTES = 256 << 20


@dataclass(frozen=True)
class Planned:
    """A tensor that is made when its file is written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(folder: Path, planned: list[Planned], shard_bytes: int) -> None:
    """Write model.safetensors, or model-0000I-of-0000N.safetensors and their index; one file in memory at a time."""
    shards: list[list[Planned]] = [[]]
    for tensor in planned:
        if shards[-1] and sum(t.bytes for t in shards[-1]) + tensor.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [WEIGHTS]
    for name, shard in zip(names, shards, strict=True):
        made = {tensor.name: tensor.make().to(tensor.dtype).contiguous() for tensor in shard}
        try:
            save_file(made, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"{folder / name} could not be written ({error}); is the disk full?") from error
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(tensor.bytes for tensor in planned)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1))


class TensorFiles:
    """The safetensors files of a folder, as a context manager; tensors are read one by one.

    shapes, dtypes: of every tensor by name. Raises UserError for pickles, a cut file, a file that is missing or
    another than the index says, and a dtype that is no float of 16 or 32 bits.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Any] = {}
        self._open = ExitStack()

    def __enter__(self) -> "TensorFiles":
        for file_name, names in self._listed():
            path = self.folder / file_name
            try:
                file = self._open.enter_context(safe_open(path, "pt"))
                found = set(file.keys())
                for name in sorted(found):
                    self._add(name, file, path)
            except (OSError, SafetensorError) as error:
                self._open.close()
                raise UserError(f"{path} cannot be read ({error}); it is missing, cut or damaged") from error
            if names is not None and found != names:
                wrong = sorted(found ^ names)[0]
                raise UserError(f"{path} and {INDEX} disagree about the tensor {wrong}; fetch both again")
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __getitem__(self, name: str) -> Tensor:
        """The tensor; raises UserError if a number in it is not finite."""
        tensor = self._files[name].get_tensor(name)
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{self.folder}: tensor {name} holds NaN or infinity; these weights are damaged")
        return tensor

    def _add(self, name: str, file: Any, path: Path) -> None:
        entry = file.get_slice(name)
        if name in self.shapes:
            raise UserError(f"{path}: tensor {name} is in two files")
        if entry.get_dtype() not in DTYPES:
            kinds = ", ".join(DTYPES)
            raise UserError(f"{path}: tensor {name} is of type {entry.get_dtype()}, and only {kinds} are read")
        self.shapes[name], self.dtypes[name] = tuple(entry.get_shape()), DTYPES[entry.get_dtype()]
        self._files[name] = file

    def _listed(self) -> Iterator[tuple[str, set[str] | None]]:
        """File names, and the tensors that each should hold where an index says so."""
        if (self.folder / INDEX).is_file():
            weight_map = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
                raise UserError(f"{self.folder / INDEX} has no table weight_map of tensors and files")
            for file_name in sorted(set(weight_map.values())):
                if Path(file_name).name != file_name:
                    raise UserError(f"{self.folder / INDEX} names {file_name!r}, which is not a file beside it")
                yield file_name, {name for name, file in weight_map.items() if file == file_name}
        elif (self.folder / WEIGHTS).is_file():
            yield WEIGHTS, None
        else:
            pickled = sorted(path.name for pattern in PICKLED for path in self.folder.glob(pattern))
            if pickled:
                raise UserError(
                    f"{self.folder} holds pickled weights ({pickled[0]}), which can run any program when they are "
                    "opened; convert them to safetensors first, or fetch that version"
                )
            raise UserError(f"{self.folder} has no {WEIGHTS} and no {INDEX}; give a folder that transformers saved")


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON; raises UserError for a missing, huge or damaged file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB, too large for what it should be")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); it is missing, cut or damaged") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no table of JSON")
    return content


def file_facts(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of files by name."""
    facts = {}
    for name in names:
        with open(folder / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        facts[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest}
    return facts

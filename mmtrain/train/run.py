"""The run directory: frozen config, artifacts it was trained on, and who may continue it.

RUN/
    config.yaml        frozen and resolved; all ranks read this file
    artifacts.json     folders of documents, tokenizers, token shards, neighbours (relative to RUN)
    environment.json   versions and machine
    metrics.jsonl  ledger.json  report.html  checkpoints/  samples/  logs/  wandb/
"""

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from mmtrain.config import Config, UserError, write_text_atomic
from mmtrain.config.compose import freeze, load_frozen
from mmtrain.track import redact
from mmtrain.train.checkpoint import has_checkpoint

# What may differ between the frozen config and a command that continues the run.
FREE_TO_CHANGE = ("run", "notes", "generate", "task", "track", "root", "data_dir", "engine", "train.evaluate_every",
                  "train.checkpoint_every", "train.keep_checkpoints", "stream.prefetch",
                  "stream.workers")  # fmt: skip
LAST = "last"  # under root: the name of the run that was trained last
PACKAGES = ("torch", "deepspeed", "webdataset", "wandb", "hydra-core", "omegaconf", "numpy", "tokenizers", "faiss-cpu")


@dataclass(frozen=True)
class Artifacts:
    """Folders that a run was made from."""

    documents: Path
    text_tokenizer: Path
    image_tokenizer: Path
    tokens: Path
    neighbours: Path | None

    def save(self, run_dir: Path) -> None:
        """Write artifacts.json with paths relative to the run directory."""
        paths = {f.name: getattr(self, f.name) for f in fields(self)}
        relative = {name: path and os.path.relpath(path, run_dir) for name, path in paths.items()}
        write_text_atomic(run_dir / "artifacts.json", json.dumps(relative, indent=1))

    @classmethod
    def load(cls, run_dir: Path) -> "Artifacts":
        """Read artifacts.json; raises UserError when it or a folder is missing."""
        file = run_dir / "artifacts.json"
        if not file.is_file():
            raise UserError(
                f"{run_dir} is no run directory (artifacts.json is missing); give run=FOLDER of a training run"
            )
        paths = {name: path and (run_dir / path).resolve() for name, path in json.loads(file.read_text()).items()}
        for name, path in paths.items():
            if path and not path.exists():
                raise UserError(f"{name} of run {run_dir} is missing: {path}; run `mmtrain train` for it again")
        return cls(**paths)

    def flops(self) -> dict[str, int]:
        """What these artifacts cost, by book of the ledger."""
        books: dict[str, int] = {}
        metrics = self.image_tokenizer / "metrics.json"
        if metrics.is_file():
            books["image_tokenizer_train"] = int(json.loads(metrics.read_text())["flops"])
        return books | json.loads((self.tokens / "flops.json").read_text())


def check_run(run_dir: Path, config: Config) -> None:
    """Raise UserError when the run in `run_dir` has a checkpoint and was trained with other settings."""
    frozen = run_dir / "config.yaml"
    if not frozen.is_file() or not has_checkpoint(run_dir / "checkpoints"):
        return
    differences = _differences(load_frozen(frozen), config)
    if differences:
        key, old, new = differences[0]
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise UserError(
            f"{run_dir} holds a run with {key}={old}, this command says {new}{more}; choose another name=, or "
            "delete that folder"
        )


def open_run(run_dir: Path, config: Config, artifacts: Artifacts, command: str) -> None:
    """Create the run directory, or continue the one that is there (`check_run` allowed it).

    command: the command line, kept in environment.json without secrets.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    if has_checkpoint(run_dir / "checkpoints") and (run_dir / "artifacts.json").is_file():
        trained_on = Artifacts.load(run_dir)
        for name, old, new in (
            (f.name, getattr(trained_on, f.name), getattr(artifacts, f.name)) for f in fields(artifacts)
        ):
            if (old and old.resolve()) != (new and new.resolve()):
                raise UserError(
                    f"{name} of run {run_dir} was {old}, and is {new} now: the data or the program changed since; "
                    "choose another name=, or bring the old data back"
                )
    freeze(config, run_dir / "config.yaml")
    artifacts.save(run_dir)
    facts = {"command": redact(command), **environment()}
    write_text_atomic(run_dir / "environment.json", json.dumps(facts, indent=1))
    write_text_atomic(run_dir.parent / LAST, run_dir.name + "\n")


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    import torch  # noqa: PLC0415

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "mmtrain": metadata.version("mmtrain") if _installed("mmtrain") else "source",
        "executable": Path(sys.executable).name,
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """Keys that differ and may not."""
    flat_old, flat_new = _flatten(asdict(old)), _flatten(asdict(new))
    return [
        (key, flat_old.get(key), flat_new.get(key))
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)
    ]


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat

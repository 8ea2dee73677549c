"""The run directory: frozen config, artifacts it was trained on, and who may continue it.

RUN/
    config.yaml        frozen and resolved; all ranks read this file
    artifacts.json     folders of documents, tokenizers, token shards, neighbours, inlined shards, pictures, by source
    environment.json   versions and machine
    metrics.jsonl  ledger.json  report.html  checkpoints/  samples/  logs/  wandb/
"""

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from mmtrain.config import Config, GenerateConfig, TrackConfig, UserError, write_text_atomic
from mmtrain.config.compose import freeze, load_frozen
from mmtrain.track import redact
from mmtrain.train.checkpoint import has_checkpoint

# What may differ between the frozen config and a command that continues the run.
FREE_TO_CHANGE = ("run", "notes", "generate", "task", "track", "sweep", "root", "data_dir", "data.processes", "engine",
                  "train.evaluate_every", "train.checkpoint_every", "train.keep_checkpoints", "train.keep_every",
                  "train.async_checkpoint", "train.dry_run", "health", "stream.prefetch",
                  "stream.workers", "diffusion.sampler", "diffusion.sampling_steps", "diffusion.decode", "mix",
                  "corpora", "store", "runner", "retrieval.inlined", "plan")  # fmt: skip
LAST = "last"  # under root: the name of the run that was trained last
PACKAGES = ("torch", "deepspeed", "webdataset", "wandb", "hydra-core", "omegaconf", "numpy", "tokenizers", "faiss-cpu")


@dataclass(frozen=True)
class Artifacts:
    """Folders that a run was made from: what depends on a source by its name, the first one being the main one.

    neighbours is empty without retrieval; inlined has the candidates' tokens of the sources that read them there;
    pictures has the latents that the diffusion baseline learns, and is empty for models of tokens.
    """

    documents: dict[str, Path]
    text_tokenizer: Path
    image_tokenizer: Path
    tokens: dict[str, Path]
    neighbours: dict[str, Path]
    inlined: dict[str, Path] = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)
    encoder: Path | None = None
    """Of retrieval, where it was trained on the corpus."""

    @property
    def main(self) -> str:
        """The source that samples, reports and the memory of `mmtrain generate` take documents from."""
        return next(iter(self.tokens))

    def save(self, run_dir: Path) -> None:
        """Write artifacts.json with paths relative to the run directory."""
        plain = {
            f.name: {name: os.path.relpath(path, run_dir) for name, path in value.items()}
            if isinstance(value := getattr(self, f.name), dict)
            else value and os.path.relpath(value, run_dir)
            for f in fields(self)
        }
        write_text_atomic(run_dir / "artifacts.json", json.dumps(plain, indent=1))

    @classmethod
    def load(cls, run_dir: Path) -> "Artifacts":
        """Read artifacts.json; raises UserError when it or a folder is missing."""
        file = run_dir / "artifacts.json"
        if not file.is_file():
            raise UserError(
                f"{run_dir} is no run directory (artifacts.json is missing); give run=FOLDER of a training run"
            )
        content = json.loads(file.read_text())

        def folder(name: str, path: str) -> Path:
            found = (run_dir / path).resolve()
            if not found.exists():
                raise UserError(f"{name} of run {run_dir} is missing: {found}; run `mmtrain train` for it again")
            return found

        def by_source(name: str) -> dict[str, Path]:
            paths = content.get(name) or {}
            if isinstance(paths, str):  # a run of mmtrain 0.1: one source, whose name is that of the folder above
                paths = {(run_dir / paths).resolve().parent.name: paths}
            return {source: folder(name, path) for source, path in paths.items()}

        return cls(
            by_source("documents"),
            folder("text_tokenizer", content["text_tokenizer"]),
            folder("image_tokenizer", content["image_tokenizer"]),
            by_source("tokens"),
            by_source("neighbours"),
            by_source("inlined"),
            by_source("pictures"),
            folder("encoder", content["encoder"]) if content.get("encoder") else None,
        )

    def flops_by_folder(self) -> dict[str, dict[str, int]]:
        """What each of these artifacts cost, by its name and by book of the ledger."""
        trained = {"image_tokenizer_train": self.image_tokenizer, "retrieval_train": self.encoder}
        found = {}
        for book, folder in trained.items():
            if folder and (folder / "metrics.json").is_file():
                found[folder] = {book: int(json.loads((folder / "metrics.json").read_text())["flops"])}
        for folder in (*self.tokens.values(), *self.neighbours.values(), *self.pictures.values()):
            found[folder] = json.loads((folder / "flops.json").read_text())
        return {f"{folder.parent.name}/{folder.name}": books for folder, books in found.items() if books}

    def left_out(self) -> dict[str, int]:
        """What the corpora held and their documents do not: data/SOURCE/left_out/REASON -> how many."""
        counts = {}
        for name, folder in self.documents.items():
            facts = json.loads((folder / "facts.json").read_text())
            for reason, count in {**facts.get("bad", {}), **facts.get("skipped", {})}.items():
                counts[f"data/{name}/left_out/{reason.replace(' ', '_')}"] = count
        return counts


def check_run(run_dir: Path, config: Config) -> None:
    """Raise UserError when the run in `run_dir` has a checkpoint and was trained with other settings."""
    frozen = run_dir / "config.yaml"
    if not frozen.is_file() or not has_checkpoint(run_dir / "checkpoints"):
        return
    trained = load_frozen(frozen)
    if config.train.flops:  # the budget will give the steps again
        config = replace(config, train=replace(config.train, steps=trained.train.steps))
    differences = _differences(trained, config)
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
        old, new = ({f.name: _resolved(getattr(a, f.name)) for f in fields(a)} for a in (trained_on, artifacts))
        for name in old:
            # A source may join a run; those that were there stay what they were.
            if old[name] != {source: new[name].get(source) for source in old[name]}:
                raise UserError(
                    f"{name} of run {run_dir} was {_shown(old[name])}, and is {_shown(new[name])} now: the data or the "
                    "program changed since; choose another name=, or bring the old data back"
                )
    freeze(without_secrets(config, run_dir), run_dir / "config.yaml")
    artifacts.save(run_dir)
    facts = {"command": redact(command), **environment()}
    write_text_atomic(run_dir / "environment.json", json.dumps(facts, indent=1))
    write_text_atomic(run_dir.parent / LAST, run_dir.name + "\n")


def without_secrets(config: Config, run_dir: Path) -> Config:
    """`config` with its free text redacted; raises UserError for a secret where training would need it."""
    words = {"notes": redact(config.notes), "track": TrackConfig(**redact(asdict(config.track)))}
    config = replace(config, **words, generate=GenerateConfig(**redact(asdict(config.generate))))
    flat, clean = _flatten(asdict(config)), _flatten(redact(asdict(config)))
    if secret := [key for key in flat if flat[key] != clean.get(key)]:
        raise UserError(
            f"{secret[0]} holds what looks like a secret, and {run_dir}/config.yaml would keep it; give it in the "
            "environment or a netrc file instead"
        )
    return config


def _resolved(paths: Path | dict[str, Path] | None) -> dict[str, Path]:
    """Absolute paths by source ("" for what no source has of its own); {} for what there is not."""
    if paths is None:
        return {}
    return {name: path.resolve() for name, path in (paths if isinstance(paths, dict) else {"": paths}).items()}


def _shown(paths: dict[str, Path]) -> str:
    return ", ".join(str(path) for path in paths.values()) or "nothing"


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
        "commit": _commit(),
        "executable": Path(sys.executable).name,
    }


def _commit() -> str | None:
    """The commit of the source checkout that this is, with "+" when files were changed since; None when it is none."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


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

"""Opening a trained run: its frozen config with the command's changes, its data, and its model ready to sample."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtrain.config import Config, UserError
from mmtrain.config.artifact import FINGERPRINT_LENGTH
from mmtrain.config.compose import compose, load_frozen, with_overrides
from mmtrain.documents import Document
from mmtrain.flops import Journal
from mmtrain.generate import PictureSampler, Sampler
from mmtrain.retrieval import Memory, window_tokens
from mmtrain.retrieval.build import MEMORY
from mmtrain.shards import DocumentShards, TokenShards
from mmtrain.tokens import ImageTokenizer, TextTokenizer, Vocabulary
from mmtrain.train.checkpoint import MANIFEST, Checkpoint, latest_checkpoint, load_into, read_checkpoint
from mmtrain.train.learner import open_learner
from mmtrain.train.picture_learner import PictureLearner
from mmtrain.train.run import LAST, Artifacts
from mmtrain.verbs.progress import Bar

__all__ = ["TrainedRun", "find_run", "open_trained", "show_progress"]


@dataclass
class TrainedRun:
    """A run directory with everything in it, loaded when first used."""

    folder: Path
    config: Config
    artifacts: Artifacts

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that generate.checkpoint names, verified."""
        name = self.config.generate.checkpoint
        folder = self.folder / "checkpoints"
        if name != "latest":
            path = folder / Path(name).name
            if not path.is_dir():
                there = sorted(found.name for found in folder.glob("step-*"))
                raise UserError(f"run {self.folder} has no checkpoint {name}; there is {', '.join(there) or 'none'}")
            return read_checkpoint(path)
        found, complaints = latest_checkpoint(folder)
        for complaint in complaints:
            print(f"mmtrain: {complaint}")
        if found is None:
            raise UserError(
                f"run {self.folder} has no checkpoint yet; train it first: `mmtrain train` with its settings"
            )
        return found

    @cached_property
    def checkpoint_fingerprint(self) -> str:
        """12 hexadecimal digits of the checkpoint's manifest, which has the SHA-256 of its files."""
        return hashlib.sha256((self.checkpoint.path / MANIFEST).read_bytes()).hexdigest()[:FINGERPRINT_LENGTH]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.load(self.artifacts.tokens[self.artifacts.main] / "vocabulary.json")

    @cached_property
    def text(self) -> TextTokenizer:
        return TextTokenizer.load(self.artifacts.text_tokenizer / "tokenizer.json")

    @cached_property
    def image(self) -> ImageTokenizer:
        return ImageTokenizer.load(self.artifacts.image_tokenizer)

    @property
    def dtype(self) -> str:
        """The run's precision, bf16 or fp32."""
        return self.checkpoint.state.get("dtype", self.config.engine.dtype)

    @cached_property
    def sampler(self) -> Any:
        """A `Sampler` or `PictureSampler` of the checkpoint on the GPU, or on the CPU in the run's precision."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        learner = open_learner(self.config, self.artifacts, self.vocabulary, torch.device(device))
        model = load_into(learner.new_model(), self.checkpoint, self.vocabulary.fingerprint)
        if self.dtype == "bf16":
            model = model.to(torch.bfloat16)
        image, g = self.image.to(device), self.config.generate
        if isinstance(learner, PictureLearner):
            c = self.config.diffusion
            return PictureSampler(model.to(device), self.text, image, c, learner.mean, learner.std, g.batch_size)
        order = self.config.objective.order
        return Sampler(model.to(device), self.vocabulary, self.text, image, g.batch_size, order)

    @cached_property
    def memory(self) -> Memory | None:
        """The retrieval memory of the main source's training split, if the run has one."""
        folder = self.artifacts.neighbours.get(self.artifacts.main)
        return Memory(folder / MEMORY) if folder else None

    @cached_property
    def memory_tokens(self) -> TokenShards:
        return TokenShards(self.artifacts.tokens[self.artifacts.main] / "train")

    def held_out(self, limit: int) -> list[Document]:
        """The first `limit` validation documents of the main source."""
        shards = DocumentShards(self.artifacts.documents[self.artifacts.main] / "validation")
        return [shards[i] for i in range(min(limit, len(shards)))]

    def retrieved(
        self, texts: Sequence[str | None], pictures: Sequence[np.ndarray | None] | None = None
    ) -> list[list[np.ndarray]] | None:
        """Token ids of the documents to place before each prompt: its text, its (S, S, 3) picture, or both.

        generate.retrieve_by chooses between the two where both are given; a prompt that lacks what it asks for is
        searched by what it has.
        """
        memory, g = self.memory, self.config.generate
        if memory is None or not g.retrieve:
            return None
        k = self.config.retrieval.num_documents
        before = memory.encoder.flops
        found = []
        for text, picture in zip(texts, pictures or [None] * len(texts), strict=True):
            both = bool(text) and picture is not None
            found.append(
                memory.search(
                    None if both and g.retrieve_by == "image" else text,
                    None if both and g.retrieve_by == "text" else picture,
                    k,
                )
            )
        self.book("retrieval_encode", memory.encoder.flops - before, "retrieval for samples")
        # Where training draws their order, the best one stands last, next to the prompt.
        best_first = self.config.retrieval.order == "best_first"
        return [
            [window_tokens(self.memory_tokens, *memory.place(i)) for i in (row if best_first else reversed(row))]
            for row in found
        ]

    def book(self, kind: str, flops: int, by: str = "command") -> None:
        """Book FLOPs of the command `by` in the run's ledger."""
        if flops:
            Journal(self.folder).book(kind, flops, by)


def open_trained(argv: list[str]) -> TrainedRun:
    """The run that `find_run` finds, with the other words of the command as settings."""
    folder, rest = find_run(argv)
    config = with_overrides(load_frozen(folder / "config.yaml"), rest)
    return TrainedRun(folder, config, Artifacts.load(folder))


def find_run(argv: list[str]) -> tuple[Path, list[str]]:
    """The folder that run=FOLDER, experiment=NAME or name=NAME names, or the last that was trained; the other words."""
    keys = {argument.partition("=")[0]: argument.partition("=")[2] for argument in argv if "=" in argument}
    if "experiment" in keys or "name" in keys:
        config = compose(argv)
        folder = Path(config.root) / config.name
        rest = [a for a in argv if a.partition("=")[0] not in ("experiment", "name", "root", "run")]
    else:
        root = Path(keys.get("root", Config().root))
        folder = Path(keys["run"]) if keys.get("run") else _last(root)
        rest = [a for a in argv if a.partition("=")[0] not in ("root", "run")]
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run directory (config.yaml is missing); give run=FOLDER of a training run")
    return folder, rest


def _last(root: Path) -> Path:
    note = root / LAST
    if not note.is_file():
        raise UserError(
            f"nothing was trained under {root} yet; run `mmtrain train experiment=quickstart`, or give run=FOLDER"
        )
    return root / note.read_text().strip()


def show_progress(sampler: Sampler | PictureSampler, label: str) -> Bar:
    """A progress bar over the batches of a sampler, as a context manager."""
    bar = Bar(label)
    sampler.progress = bar
    return bar

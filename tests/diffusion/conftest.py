"""A small corpus of captioned pictures: token shards, and the latents of its pictures."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtrain.config import Config, StreamConfig
from mmtrain.config.randomness import random_stream
from mmtrain.shards import TokenShards, write_tokens
from mmtrain.stream import Source, Stream
from mmtrain.tokens import TokenDocument, TokenSegment, Vocabulary
from mmtrain.train.picture_learner import PictureLearner
from mmtrain.train.run import Artifacts
from tests.train.small_run import VOCABULARY, small_config

LATENT = (3, 2, 2)
CELLS = LATENT[1] * LATENT[2]
DOCUMENTS = {"train": 40, "validation": 8}


def document(split: str, index: int, vocabulary: Vocabulary = VOCABULARY) -> TokenDocument:
    """A caption whose first id tells which of four pictures belongs to it, and codes."""
    draws = random_stream("pictures", split, index)
    caption = draws.integers(0, 100, int(draws.integers(2, 9)))
    caption[0] = index % 4
    text, codes = caption + vocabulary.text_start, np.full(CELLS, vocabulary.image_start + index % 4)
    tokens = np.concatenate([text, [vocabulary.brk], codes]).astype(vocabulary.dtype)
    segments = (TokenSegment("text", 0, len(text)), TokenSegment("image", len(text) + 1, CELLS))
    return TokenDocument(f"{split}-{index}", tokens, segments, {})


def picture(index: int) -> np.ndarray:
    return random_stream("a picture", index % 4).standard_normal(LATENT).astype(np.float16) / 2


@dataclass(frozen=True)
class Corpus:
    folder: Path

    def learner(self, config: Config) -> PictureLearner:
        nowhere = {"small": self.folder}
        artifacts = Artifacts(nowhere, self.folder, self.folder, nowhere, {}, pictures=nowhere)
        return PictureLearner(config, artifacts, VOCABULARY, torch.device("cpu"))

    def stream(self, config: Config, with_origin: bool = True, split: str = "train") -> Stream:
        sources = [Source("small", TokenShards(self.folder / f"tokens-{split}"))]
        return Stream(sources, VOCABULARY, config.stream, config.objective, None, config.seed, with_origin=with_origin)


def diffusion_config(steps: int = 4, **model: object) -> Config:
    config = small_config(steps, family="dit", layers=1, width=32, heads=2, **model)
    config.stream = StreamConfig(sequence_length=64, global_batch=4, lanes=4, prefetch=0)
    config.objective.num_sentinels = VOCABULARY.num_sentinels
    return config


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("pictures")
    for split, number in DOCUMENTS.items():
        documents = [document(split, i) for i in range(number)]
        write_tokens(folder / f"tokens-{split}", documents, VOCABULARY, "text", "image")
        (folder / split).mkdir()
        captions = [d.tokens[: d.segments[0].length] - VOCABULARY.text_start for d in documents]
        np.save(folder / split / "captions.npy", np.concatenate(captions))
        np.save(folder / split / "starts.npy", np.cumsum([0, *map(len, captions)]))
        np.save(folder / split / "latents.npy", np.stack([picture(i) for i in range(number)]))
    (folder / "statistics.json").write_text(json.dumps({"mean": [0.0] * 3, "std": [0.5] * 3}))
    return Corpus(folder)

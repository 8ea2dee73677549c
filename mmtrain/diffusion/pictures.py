"""The prepared artifact: latents and captions of the documents of a split, by document index.

SPLIT/latents.npy   (D, C, G, G) float16, what the image tokenizer's quantizer would round
SPLIT/captions.npy  ids of all captions one after the other, 0-based ids of the text tokenizer
SPLIT/starts.npy    (D + 1,) int64, where each begins in captions.npy
statistics.json     mean and standard deviation of each channel, over the training split
D documents, C channels, G side of the latent grid, N documents of a batch.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mmtrain.config import UserError

STATISTICS = "statistics.json"


class Pictures:
    """The pictures of a split as the baseline learns them; latents are mapped, not read."""

    def __init__(self, folder: Path, split: str) -> None:
        self.mean, self.std = read_statistics(folder)
        try:
            self.latents = np.load(folder / split / "latents.npy", mmap_mode="r")
            self.captions = np.load(folder / split / "captions.npy", mmap_mode="r")
            self.starts = np.load(folder / split / "starts.npy")
        except (OSError, ValueError) as error:
            raise UserError(f"the latents in {folder} cannot be read ({error}); delete that folder, and train") from error

    def __len__(self) -> int:
        return len(self.latents)

    def normalized(self, index_N: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
        """(N, C, G, G) float32 latents of documents; mean, std: (C,), those that the model was trained with."""
        return (self.latents[index_N].astype(np.float32) - mean[:, None, None]) / std[:, None, None]

    def captions_of(self, index_N: np.ndarray) -> list[np.ndarray]:
        """Ids of the captions of documents, each (n,) int64."""
        ends = zip(self.starts[index_N].tolist(), self.starts[index_N + 1].tolist(), strict=True)
        return [self.captions[start:end].astype(np.int64) for start, end in ends]

    @property
    def longest_caption(self) -> int:
        """In tokens."""
        return int(np.diff(self.starts).max(initial=0))


def read_statistics(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, (C,) float32."""
    try:
        content: dict[str, Any] = json.loads((folder / STATISTICS).read_text())
        return np.array(content["mean"], np.float32), np.array(content["std"], np.float32)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder / STATISTICS} cannot be read ({error}); delete that folder, and train") from error


def pad_captions(captions: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Captions as (N, T) int64, 0 behind their ends, and their lengths (N,) int64; an empty one has length 1."""
    length_N = np.array([max(1, len(caption)) for caption in captions], np.int64)
    caption_NT = np.zeros((len(captions), int(length_N.max(initial=1))), np.int64)
    for row, caption in zip(caption_NT, captions, strict=True):
        row[: len(caption)] = caption
    return caption_NT, length_N

"""The `dual` encoder: two small networks on the features of `hashed`, trained on the corpus's own pairs.

Words, letter trigrams and pairs of words are looked up in one table; colors, edges and a histogram go through a small
perceptron. A convolutional network from scratch took four times as long for a step (2 of 59 pictures fewer after 100).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmtrain.config import UserError, write_text_atomic
from mmtrain.retrieval.hashed import BUCKETS, PICTURE_FEATURES, PICTURE_SIZE, picture_features, text_features

VERSION = 1
WEIGHTS, SETTINGS = "model.safetensors", "config.json"
BATCH = 256
FEATURE_SCALE = 16.0  # the three parts of a picture's features have unit norm; a network wants numbers of about 1
TEMPERATURE, HIGHEST_SCALE = 0.07, 100.0  # at the start, and the bound, of CLIP (Radford et al. 2021, sec. 2.3)


@dataclass(frozen=True)
class DualSizes:
    """Sizes of the networks: width of the table's rows, hidden units of each tower, numbers of a vector."""

    dimension: int
    width: int = 128
    hidden: int = 512


class DualNetwork(nn.Module):
    """Text and picture towers to unit vectors of one space; `log_scale`: of their cosines in the loss."""

    def __init__(self, sizes: DualSizes, dropout: float = 0.0) -> None:
        super().__init__()
        self.sizes = sizes
        self.words = nn.EmbeddingBag(BUCKETS, sizes.width, mode="sum")
        nn.init.normal_(self.words.weight, std=0.05)
        self.text = nn.Sequential(nn.LayerNorm(sizes.width), *_perceptron(sizes.width, sizes, 0.0))
        self.picture = nn.Sequential(*_perceptron(PICTURE_FEATURES, sizes, dropout))
        self.log_scale = nn.Parameter(torch.tensor(-np.log(TEMPERATURE), dtype=torch.float32))

    def encode_texts(self, features: Sequence[np.ndarray]) -> Tensor:
        """Buckets of n texts, none of them empty, to (n, d) float32 of unit norm."""
        starts = np.cumsum([0, *(len(one) for one in features[:-1])])
        found = self.words(torch.from_numpy(np.concatenate(features)), torch.from_numpy(starts))
        return F.normalize(self.text(found), dim=-1)

    def encode_pictures(self, features: Tensor) -> Tensor:
        """(n, PICTURE_FEATURES) float32 to (n, d) float32 of unit norm."""
        return F.normalize(self.picture(features * FEATURE_SCALE), dim=-1)

    @property
    def flops(self) -> tuple[int, int]:
        """FLOPs of one text and of one picture through the matrices; sums of the table's rows are not counted."""
        s = self.sizes
        return 2 * s.hidden * (s.width + s.dimension), 2 * s.hidden * (PICTURE_FEATURES + s.dimension)


def _perceptron(width: int, sizes: DualSizes, dropout: float) -> list[nn.Module]:
    return [
        nn.Linear(width, sizes.hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(sizes.hidden, sizes.dimension)
    ]  # fmt: skip


class DualEncoder:
    """A trained `DualNetwork` as an encoder of documents. Raises UserError for a folder that holds none."""

    picture_size = PICTURE_SIZE
    is_centered = True

    def __init__(self, folder: Path) -> None:
        self._network = load_dual(folder)
        self.dimension = self._network.sizes.dimension
        digest = hashlib.sha256()
        for name, tensor in sorted(self._network.state_dict().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        self.fingerprint = f"dual-{VERSION}-{digest.hexdigest()[:12]}"
        self.flops = 0

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d) float32 of unit norm, zeros for a text with no word in it."""
        out = np.zeros((len(texts), self.dimension), np.float32)
        features = [text_features(text) for text in texts]
        told = [i for i, of_text in enumerate(features) if len(of_text)]
        for start in range(0, len(told), BATCH):
            rows = told[start : start + BATCH]
            out[rows] = self._network.encode_texts([features[i] for i in rows]).numpy()
        self.flops += len(told) * self._network.flops[0]
        return out

    @torch.inference_mode()
    def encode_pictures(self, pixels: np.ndarray) -> np.ndarray:
        """(n, 64, 64, 3) uint8 to (n, d) float32 of unit norm."""
        out = np.zeros((len(pixels), self.dimension), np.float32)
        for start in range(0, len(pixels), BATCH):
            features = np.stack([picture_features(picture) for picture in pixels[start : start + BATCH]])
            out[start : start + BATCH] = self._network.encode_pictures(torch.from_numpy(features)).numpy()
        self.flops += len(pixels) * self._network.flops[1]
        return out


def save_dual(network: DualNetwork, folder: Path) -> None:
    """Write model.safetensors and config.json."""
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / WEIGHTS)
    content = {"version": VERSION, "sizes": asdict(network.sizes)}
    write_text_atomic(folder / SETTINGS, json.dumps(content, indent=1) + "\n")


def load_dual(folder: Path) -> DualNetwork:
    """The network that `save_dual` wrote. Raises UserError for a folder that is not whole or of another version."""
    try:
        content = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, not {VERSION}")
        network = DualNetwork(DualSizes(**content["sizes"]))
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"retrieval.encoder_path={folder} holds no dual encoder ({reason}); train one with "
            "`mmtrain retrieval train-encoder`"
        ) from error
    return network.eval()

"""CLIP and SigLIP as encoders of documents, from a Hugging Face folder or hub id."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch.utils.flop_counter import FlopCounterMode

from mmtrain.config import UserError

MODELS = ("clip", "siglip", "siglip2")
BATCH = 64


class ClipEncoder:
    """A CLIP or SigLIP model of transformers (extra `hf`); safetensors alone, no code from the hub.

    path: a folder with config.json, model.safetensors, the tokenizer and preprocessor_config.json, or a hub id.
    Texts are cut to the length of the model. Raises UserError for another kind of model and a folder that is not whole.
    """

    is_centered = False

    def __init__(self, path: str, device: str = "cpu") -> None:
        try:
            from transformers import AutoConfig, AutoModel, AutoTokenizer
        except ImportError as error:
            raise UserError(
                "retrieval.encoder=clip needs the package transformers: pip install 'mmtrain[hf]'"
            ) from error
        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": Path(path).is_dir()}
        try:
            self._config = AutoConfig.from_pretrained(path, **options)
            kind = self._config.model_type
            if kind not in MODELS:
                raise UserError(f"{path} is a model of type {kind}; retrieval.encoder=clip takes {' or '.join(MODELS)}")
            self._tokenizer = AutoTokenizer.from_pretrained(path, **options)
            self._pixels = _pixel_statistics(path)
            model = AutoModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32, **options)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"retrieval.encoder_path={path} holds no CLIP or SigLIP model ({reason})") from error
        self._model = model.eval().to(device)
        self._device = device
        self._length = self._config.text_config.max_position_embeddings
        self.picture_size = self._config.vision_config.image_size
        self._flops_per_text, self._flops_per_picture = _flops(self._config)
        self.fingerprint = _fingerprint(kind, model, self._tokenizer, self._pixels)
        self.dimension = len(self._features("get_text_features", **self._tokens(["a"]))[0])
        self.flops = 0

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d) float32 of unit norm; zeros for a text without a letter or digit."""
        out = np.zeros((len(texts), self.dimension), np.float32)
        told = [i for i, text in enumerate(texts) if any(map(str.isalnum, text))]
        for start in range(0, len(told), BATCH):
            rows = told[start : start + BATCH]
            out[rows] = self._features("get_text_features", **self._tokens([texts[i] for i in rows]))
        self.flops += len(told) * self._flops_per_text
        return out

    def encode_pictures(self, pixels: np.ndarray) -> np.ndarray:
        """(n, S, S, 3) uint8 to (n, d) float32 of unit norm."""
        mean, deviation = (torch.tensor(values, device=self._device).view(3, 1, 1) for values in self._pixels)
        out = np.zeros((len(pixels), self.dimension), np.float32)
        for start in range(0, len(pixels), BATCH):
            batch = torch.from_numpy(pixels[start : start + BATCH]).to(self._device).permute(0, 3, 1, 2) / 255
            out[start : start + BATCH] = self._features("get_image_features", pixel_values=(batch - mean) / deviation)
        self.flops += len(pixels) * self._flops_per_picture
        return out

    def _tokens(self, texts: list[str]) -> dict[str, torch.Tensor]:
        # To the full length, as SigLIP was trained; it keeps a vector from depending on the others of its batch.
        found = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        )
        names = ("input_ids", "attention_mask") if self._config.model_type == "clip" else ("input_ids",)
        return {name: found[name].to(self._device) for name in names}

    @torch.no_grad()
    def _features(self, method: str, **inputs: torch.Tensor) -> np.ndarray:
        found = getattr(self._model, method)(**inputs)
        vectors = getattr(found, "pooler_output", found).float()  # transformers 4 returns the tensor
        return torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy()


def _pixel_statistics(path: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the colors, from preprocessor_config.json."""
    name = "preprocessor_config.json"
    file = Path(path) / name
    if not Path(path).is_dir():
        from huggingface_hub import hf_hub_download

        file = Path(hf_hub_download(path, name))
    found = json.loads(file.read_text(encoding="utf-8"))
    return [float(value) for value in found["image_mean"]], [float(value) for value in found["image_std"]]


def _flops(config: Any) -> tuple[int, int]:
    """FLOPs of one text at full length and of one picture, counted on the meta device; 1 multiply-add = 2."""
    from transformers import AutoModel

    size, length = config.vision_config.image_size, config.text_config.max_position_embeddings
    with torch.device("meta"), torch.no_grad():
        model = AutoModel.from_config(config, attn_implementation="eager")
        counts = []
        for method, inputs in (
            ("get_text_features", {"input_ids": torch.zeros(1, length, dtype=torch.long)}),
            ("get_image_features", {"pixel_values": torch.zeros(1, 3, size, size)}),
        ):
            with FlopCounterMode(display=False) as counter:
                getattr(model, method)(**inputs)
            counts.append(counter.get_total_flops())
    return counts[0], counts[1]


def _fingerprint(kind: str, model: torch.nn.Module, tokenizer: Any, pixels: tuple[list[float], list[float]]) -> str:
    """12 hexadecimal digits of weights, vocabulary and colors."""
    digest = hashlib.sha256(json.dumps([kind, pixels, sorted(tokenizer.get_vocab().items())]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return f"{kind}-{digest.hexdigest()[:12]}"

"""Model families by name."""

import torch

from mmtrain.config import Config, ModelConfig
from mmtrain.models.chameleon import Chameleon
from mmtrain.models.cm3leon import Cm3leon
from mmtrain.models.decoder import Decoder
from mmtrain.models.llama import Llama

FAMILIES: dict[str, type[Decoder]] = {"cm3leon": Cm3leon, "chameleon": Chameleon, "llama": Llama}


def build_model(config: ModelConfig, vocabulary_size: int, max_positions: int, device: str = "cpu") -> Decoder:
    """An uninitialized model on `device` ("meta" allocates nothing); call `initialize(seed)` before training."""
    with torch.device(device):
        return FAMILIES[config.family](config, vocabulary_size, max_positions)


def num_positions(config: Config) -> int:
    """Longest sequence of a run, in tokens."""
    return config.model.max_positions or config.stream.sequence_length


def count_parameters(config: ModelConfig, vocabulary_size: int, max_positions: int) -> int:
    """Parameters of the model, a tied head counted once; nothing is allocated."""
    return sum(p.numel() for p in build_model(config, vocabulary_size, max_positions, "meta").parameters())

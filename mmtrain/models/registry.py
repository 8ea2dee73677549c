"""Model families by name."""

from collections import Counter
from dataclasses import astuple
from functools import cache
from typing import Any

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
    return sum(parameters_by_module(config, vocabulary_size, max_positions).values())


def parameters_by_module(config: ModelConfig, vocabulary_size: int, max_positions: int) -> dict[str, int]:
    """Parameters by the module that holds them: token_embedding, attention, ffn, head, ...; nothing is allocated."""
    return dict(_by_module(astuple(config), vocabulary_size, max_positions))


@cache
def _by_module(values: tuple[Any, ...], vocabulary_size: int, max_positions: int) -> Counter[str]:
    """The blocks' parameters by their part, all others by the model's; values: of a ModelConfig."""
    counts: Counter[str] = Counter()
    model = build_model(ModelConfig(*values), vocabulary_size, max_positions, "meta")
    for name, parameter in model.named_parameters():
        module = name.split(".")
        counts[module[2] if module[0] == "blocks" else module[0]] += parameter.numel()
    return counts

"""Model families by name."""

from dataclasses import astuple
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

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
    return sum(p.numel() for p in shapes_only(config, vocabulary_size, max_positions).parameters())


def shapes_only(config: ModelConfig, vocabulary_size: int, max_positions: int) -> Decoder:
    """The model on the meta device, to look at; one for all who ask."""
    return _shapes_only(astuple(config), vocabulary_size, max_positions)


@cache
def _shapes_only(values: tuple[Any, ...], vocabulary_size: int, max_positions: int) -> Decoder:
    with _NothingDrawn():
        return build_model(ModelConfig(*values), vocabulary_size, max_positions, "meta")


class _NothingDrawn(TorchFunctionMode):
    """Leaves out normal_, for which torch imports its compiler on the meta device: two seconds for nothing."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if function is nn.init.normal_ else function(*args, **(kwargs or {}))

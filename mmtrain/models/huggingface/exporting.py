"""A trained model as a folder that transformers opens."""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtrain.config import ModelConfig, UserError
from mmtrain.models.huggingface.architecture import NO_ENCODER, refusal, to_config
from mmtrain.models.huggingface.layout import Piece, split, tensor_layout
from mmtrain.models.huggingface.shards import SHARD_BYTES, Planned, write_tensors
from mmtrain.models.huggingface.tokenizer import read_tokenizer, whole_space, write_tokenizer
from mmtrain.tokens import Vocabulary

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def check_exportable(config: ModelConfig) -> None:
    """Raise UserError with the reason if transformers has no class that computes this model."""
    if sentence := refusal(config):
        raise UserError(sentence)


def export_folder(
    config: ModelConfig,
    parameters: Mapping[str, Tensor],
    vocabulary: Vocabulary,
    tokenizer: Path,
    positions: int,
    out: Path,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write weights, config, generation config and tokenizer into the folder `out`.

    parameters: by our names (a tied head left out or not); tokenizer: our text's tokenizer.json; positions: the
    longest sequence; dtype: float32 or bf16. Raises UserError for what transformers cannot express.
    """
    check_exportable(config)
    torch_dtype = DTYPES[dtype]
    content, specials = whole_space(read_tokenizer(tokenizer), vocabulary, str(tokenizer))
    write_tokenizer(content, out / "tokenizer.json", str(tokenizer))
    settings = to_config(config, vocabulary, positions, str(torch_dtype).removeprefix("torch."))
    _write_json(out / "config.json", settings)
    ids = {key: settings[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    _write_json(out / "generation_config.json", ids | {"max_length": positions})
    kinds = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), specials, strict=False))
    _write_json(
        out / "tokenizer_config.json",
        kinds
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": positions,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )
    vocabulary.save(out / "vocabulary.json")
    write_tensors(out, list(_planned(config, parameters, vocabulary.size, positions, torch_dtype)), shard_bytes)


def _planned(
    config: ModelConfig, parameters: Mapping[str, Tensor], vocabulary_size: int, positions: int, dtype: torch.dtype
) -> Iterator[Planned]:
    for name, pieces in tensor_layout(config, vocabulary_size, positions).items():
        for piece in pieces:
            yield Planned(piece.name, piece.shape, dtype, partial(_piece, parameters[name], pieces, piece))
    if config.family == "chameleon":
        for name, shape in _no_encoder():
            yield Planned(name, shape, dtype, partial(torch.zeros, shape))


def _piece(tensor: Tensor, pieces: tuple[Piece, ...], wanted: Piece) -> Tensor:
    return next(made for name, made in split(tensor, pieces) if name == wanted.name)


def _no_encoder() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of `NO_ENCODER`; transformers would draw them and warn."""
    wide, stem = NO_ENCODER["base_channels"], "model.vqmodel."
    norm, conv = ((wide,), (wide,)), ((wide, wide, 3, 3), (wide,))
    modules: dict[str, Any] = {"encoder.conv_in": ((wide, 3, 3, 3), (wide,))}
    for block in ("encoder.mid.block_1", "encoder.mid.block_2"):
        modules |= {f"{block}.norm1": norm, f"{block}.conv1": conv, f"{block}.norm2": norm, f"{block}.conv2": conv}
    modules |= {"encoder.norm_out": norm, "encoder.conv_out": ((1, wide, 3, 3), (1,))}
    modules |= {"quant_conv": ((1, 1, 1, 1), (1,)), "post_quant_conv": ((1, 1, 1, 1), (1,))}
    for name, (weight, bias) in modules.items():
        yield f"{stem}{name}.weight", weight
        yield f"{stem}{name}.bias", bias
    yield f"{stem}quantize.embedding.weight", (1, 1)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""config.json of transformers from a model, and a model from a config.json of OPT, Llama or Chameleon."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmtrain.config import ModelConfig, UserError
from mmtrain.tokens import Vocabulary

FIXED_EPS = 1e-5
"""Epsilon of the norms that transformers does not read from a config: OPT's, and Chameleon's of queries and keys."""

# Chameleon's config cannot be without an image encoder. Ours takes token ids, so this is the smallest there is.
NO_ENCODER = {
    "model_type": "chameleon_vqgan",
    "embed_dim": 1,
    "num_embeddings": 1,
    "latent_channels": 1,
    "resolution": 32,
    "base_channels": 32,
    "channel_multiplier": [1],
    "num_res_blocks": 0,
    "attn_type": "none",
}


@dataclass(frozen=True)
class Architecture:
    """What a config.json says: the model, the rows of its embedding, its longest sequence."""

    model: ModelConfig
    vocabulary_size: int
    positions: int


def refusal(config: ModelConfig) -> str | None:
    """Why transformers has no class for this model, in one sentence; None where it has."""
    if config.picture_grid:
        return (
            f"model.picture_grid={config.picture_grid}: no model of transformers has rows and columns of pictures; "
            "train with model.picture_grid=0 to export"
        )
    if config.family != "llama" and config.norm_eps != FIXED_EPS:
        return (
            f"model.norm_eps={config.norm_eps:g}: transformers computes norms of this family with {FIXED_EPS:g}, "
            "whatever its config says; only that can be exported"
        )
    return None


def to_config(config: ModelConfig, vocabulary: Vocabulary, positions: int, dtype: str) -> dict[str, Any]:
    """The config.json that makes transformers compute what our model computes; dtype: torch's name of it."""
    content: dict[str, Any] = {
        "vocab_size": vocabulary.size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": vocabulary.pad,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "dtype": dtype,
    }
    if config.family == "cm3leon":
        return content | {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "ffn_dim": config.feed_forward_width,
            "word_embed_proj_dim": config.width,
            "activation_function": config.activation,
            "do_layer_norm_before": True,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "dropout": config.dropout,
            "attention_dropout": 0.0,
        }
    content |= {
        "intermediate_size": config.feed_forward_width,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,  # where transformers 4 looks, and 5 below
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "attention_bias": False,
        "mlp_bias": False,
    }
    if config.family == "llama":
        return content | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return content | {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "swin_norm": config.norm_after,
        "model_parallel_size": 1,
        # transformers forbids every token that is named IMGIMG... here, in training too; so none is named.
        "vocabulary_map": {},
        "vq_config": NO_ENCODER,
    }


def from_config(content: dict[str, Any], place: str) -> Architecture:
    """The model of a config.json; raises UserError for what ours cannot compute, in one sentence naming the key."""
    kind = content.get("model_type")
    if kind not in READERS:
        raise UserError(f"{place} is of the architecture {kind!r}; `mmtrain import` reads {', '.join(READERS)}")
    for key in ("quantization_config", "sliding_window"):
        _require(content, place, key, None)
    width, heads = _whole(content, place, "hidden_size"), _whole(content, place, "num_attention_heads")
    kv_heads = _whole(content, place, "num_key_value_heads", heads)
    if width % heads or heads % kv_heads or (kind != "opt" and width // heads % 2):
        raise UserError(f"{place}: width {width}, {heads} heads and {kv_heads} heads of keys do not fit each other")
    shared: dict[str, Any] = {
        "layers": _whole(content, place, "num_hidden_layers"),
        "width": width,
        "heads": heads,
        "kv_heads": kv_heads if kv_heads != heads else 0,
        "max_positions": _whole(content, place, "max_position_embeddings"),
        "tie_embeddings": _flag(content, place, "tie_word_embeddings", kind == "opt"),
    }
    model = ModelConfig(**shared, **READERS[kind](content, place))
    return Architecture(model, _whole(content, place, "vocab_size"), model.max_positions)


def _read_opt(content: dict[str, Any], place: str) -> dict[str, Any]:
    if content.get("enable_bias", True) or content.get("layer_norm_elementwise_affine", True):
        raise UserError(
            f"{place}: this OPT has biases or norms with parameters, and the cm3leon family has none; only an OPT with "
            "enable_bias and layer_norm_elementwise_affine false can be imported"
        )
    _require(content, place, "do_layer_norm_before", True)
    _require(content, place, "_remove_final_layer_norm", False)
    width = content["hidden_size"]
    _require(content, place, "word_embed_proj_dim", width, default=width)
    activation = content.get("activation_function", "relu")
    if activation not in ("relu", "gelu"):
        raise UserError(f"{place}: activation_function={activation!r} is not relu or gelu")
    return {
        "family": "cm3leon",
        "ffn_width": _whole(content, place, "ffn_dim"),
        "activation": activation,
        "norm_eps": FIXED_EPS,
    }


def _read_llama(content: dict[str, Any], place: str) -> dict[str, Any]:
    for key in ("attention_bias", "mlp_bias"):
        _require(content, place, key, False)
    _require(content, place, "hidden_act", "silu")
    head_size = content["hidden_size"] // content["num_attention_heads"]
    _require(content, place, "head_dim", head_size, default=head_size)
    rope = content.get("rope_parameters") or {}
    scaling = content.get("rope_scaling") or rope
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        raise UserError(f"{place}: rope_parameters={rope or scaling!r} is no table of settings")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type != "default" or scaling.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{place}: rotary positions of type {rope_type!r} are not supported, only plain ones are")
    _require(content, place, "partial_rotary_factor", 1, default=1)
    return {
        "family": "llama",
        "ffn_width": _whole(content, place, "intermediate_size"),
        "rope_base": _number({"rope_theta": 10000.0} | content | rope, place, "rope_theta"),
        "norm_eps": _number({"rms_norm_eps": 1e-6} | content, place, "rms_norm_eps"),
    }


def _read_chameleon(content: dict[str, Any], place: str) -> dict[str, Any]:
    read = _read_llama({"rms_norm_eps": 1e-5} | content, place)
    if read["norm_eps"] != FIXED_EPS:
        raise UserError(
            f"{place}: rms_norm_eps={read['norm_eps']:g}, but norms of queries and keys have {FIXED_EPS:g} in "
            "transformers, and ours have one epsilon for all"
        )
    return read | {"family": "chameleon", "norm_after": _flag(content, place, "swin_norm", False)}


READERS: dict[str, Callable[[dict[str, Any], str], dict[str, Any]]] = {
    "opt": _read_opt,
    "llama": _read_llama,
    "chameleon": _read_chameleon,
}


def _require(content: dict[str, Any], place: str, key: str, value: Any, default: Any = None) -> None:
    """Raise UserError unless `key` is absent, null or `value`."""
    found = content.get(key, default)
    if found is not None and found != value:
        allowed = "" if value is None else f", only {value!r} is"
        raise UserError(f"{place}: {key}={str(found)[:60]} is not supported{allowed}")


def _whole(content: dict[str, Any], place: str, key: str, default: int | None = None) -> int:
    value = content.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{place}: {key}={str(value)[:60]} must be a whole number of at least 1")
    return value


def _number(content: dict[str, Any], place: str, key: str) -> float:
    value = content[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise UserError(f"{place}: {key}={str(value)[:60]} must be a number above 0")
    return float(value)


def _flag(content: dict[str, Any], place: str, key: str, default: bool) -> bool:
    value = content.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UserError(f"{place}: {key}={str(value)[:60]} must be true or false")
    return value

"""Which values are allowed: the ranges of the schema, and combinations that cannot work."""

import re
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from typing import Any

from mmtrain.config.errors import UserError
from mmtrain.config.schema import Config

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*")  # those of a sweep say what is particular: model=tiny,seed=1
SHORTEST_CAPTION = 8
"""Tokens that must fit beside one picture: <eos>, <break>, a mask and a few words."""


def walk(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Field]]:
    """Every leaf of a configuration: dotted key, value, dataclass field."""
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield from walk(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value, item


def validate(config: Config) -> Config:
    """Return `config`; raise UserError with one sentence for the first thing that cannot work."""
    for key, value, item in walk(config):
        _check_range(key, value, item)
    for sentence in _conflicts(config):
        raise UserError(sentence)
    return config


def _check_range(key: str, value: Any, item: Field) -> None:
    meaning = f" ({item.metadata['help'].rstrip('.')})"
    choices, minimum, maximum = (item.metadata[name] for name in ("choices", "minimum", "maximum"))
    if choices and value not in choices:
        allowed = ", ".join(str(choice) for choice in choices)
        raise UserError(f"{key}={value} is not one of {allowed}{meaning}")
    # Written so that NaN, which compares false with everything, is refused too.
    if minimum is not None and not value >= minimum:
        raise UserError(f"{key}={value} is too small, it must be at least {minimum:g}{meaning}")
    if maximum is not None and not value <= maximum:
        raise UserError(f"{key}={value} is too large, it must be at most {maximum:g}{meaning}")


def _conflicts(config: Config) -> Iterator[str]:
    """One sentence per combination of values that cannot work."""
    yield from _name_conflicts(config)
    yield from _picture_conflicts(config)
    yield from _sequence_conflicts(config)
    yield from _engine_conflicts(config)
    yield from _diffusion_conflicts(config)
    if min(config.plan.nodes, default=1) < 1:
        yield f"plan.nodes={config.plan.nodes} has a number below 1; give numbers of nodes such as [1,2,4]"
    if config.optim.warmup_steps > config.train.steps and not config.train.flops:
        yield (
            f"optim.warmup_steps={config.optim.warmup_steps} is longer than train.steps={config.train.steps}; "
            "shorten the warm-up or train for longer"
        )


def _name_conflicts(config: Config) -> Iterator[str]:
    for key, name, safe in (("name", config.name, RUN_NAME), ("corpus.name", config.corpus.name, SAFE_NAME)):
        if not safe.fullmatch(name):
            yield f"{key}={name!r} cannot name a folder; use letters, digits, '.', '_' and '-', a letter or digit first"
    for name, corpus in config.sources.items():
        if not corpus.tokens:
            if corpus.retrieved:
                yield f"corpus {name} has retrieved={corpus.retrieved} but no tokens to which they belong"
            continue
        if not (config.text_tokenizer.path and config.image_tokenizer.path):
            yield (
                f"corpus {name} gives ready token shards (tokens={corpus.tokens}); set text_tokenizer.path and "
                "image_tokenizer.path to the tokenizers that made them"
            )
        if "?" in corpus.tokens or "@" in corpus.tokens.partition("://")[2].partition("/")[0]:
            yield f"tokens of corpus {name} hold a password or a signature, and configurations are saved; leave it out"
    if config.corpus.kind == "pairs" and not (config.corpus.path or config.corpus.tokens):
        yield (
            "corpus.path is empty, and corpus=pairs needs it; set corpus.path=FOLDER (pictures with .txt beside them) "
            "or corpus.path=captions.jsonl or corpus.path=captions.csv"
        )
    for name, share in config.mix.items():
        shares = share if isinstance(share, dict) else {"0": share}
        steps_are_numbers = all(str(step).isdigit() for step in shares)
        shares_are_numbers = all(isinstance(x, (int, float)) and 0 <= x < float("inf") for x in shares.values())
        if not (shares and steps_are_numbers and shares_are_numbers and any(shares.values())):
            yield (
                f"mix.{name}={share} is no share of the tokens; give a number above 0, or numbers by step such as "
                "{0:3,5000:1}"
            )
    if config.corpus.kind == "img2dataset" and not (config.corpus.path or config.corpus.tokens):
        yield "corpus.path is empty, and corpus=img2dataset needs it; set corpus.path to a folder of tars or to one tar"


def _picture_conflicts(config: Config) -> Iterator[str]:
    pictures, size = config.image_tokenizer, config.corpus.image_size
    if size % pictures.downsample:
        yield (
            f"corpus.image_size={size} is not a multiple of image_tokenizer.downsample={pictures.downsample}; "
            f"{size // pictures.downsample * pictures.downsample or pictures.downsample} would be"
        )
    if pictures.quantizer == "lfq" and pictures.codebook_size & (pictures.codebook_size - 1):
        yield (
            f"image_tokenizer.codebook_size={pictures.codebook_size} is not a power of two, as quantizer=lfq needs; "
            f"{1 << (pictures.codebook_size.bit_length() - 1)} would be"
        )
    if pictures.quantizer == "fsq" and (not pictures.levels or min(pictures.levels) < 2):
        yield f"image_tokenizer.levels={pictures.levels} must be one or more numbers of at least 2, such as [8,5,5,5]"


def _engine_conflicts(config: Config) -> Iterator[str]:
    engine = config.engine
    if engine.stage != "auto" and type(engine.stage) is not int:
        yield f"engine.stage={engine.stage} is not one of auto, 0, 1, 2, 3; write a whole number"
    if engine.kind == "ddp":
        yield from _ddp_conflicts(config)
        return
    if engine.stage == 0 and engine.dtype == "bf16":
        yield (
            "engine.stage=0 with engine.dtype=bf16 would accumulate gradients in bf16: DeepSpeed has no float32 "
            "accumulation there; use engine.stage=1, engine=ddp, or engine.dtype=fp32"
        )
    if engine.stage == 0 and engine.offload_optimizer:
        yield (
            "engine.offload_optimizer=true needs masters that are apart from the parameters, and engine.stage=0 has "
            "none; use engine.stage=1, or offload_optimizer=false"
        )
    if engine.stage not in (3, "auto") and engine.offload_parameters:
        yield (
            f"engine.offload_parameters=true needs parameters that are gathered when used, and engine.stage="
            f"{engine.stage} holds all of them at all times; use engine.stage=3, or offload_parameters=false"
        )
    if engine.dtype == "fp32" and engine.reduce_dtype == "bf16":
        yield (
            "engine.reduce_dtype=bf16 would round the gradients of engine.dtype=fp32; use engine.reduce_dtype=fp32, "
            "or engine.dtype=bf16"
        )
    if config.optim.kind == "muon":
        yield "optim.kind=muon needs whole matrices, and ZeRO takes them apart; use engine=ddp, or optim.kind=adamw"


def _ddp_conflicts(config: Config) -> Iterator[str]:
    engine = config.engine
    for name in ("offload_optimizer", "offload_parameters"):
        if getattr(engine, name):
            yield f"engine.{name}=true is DeepSpeed's, and engine=ddp keeps all on the device; use engine=zero3"
    if engine.reduce_dtype != "fp32":
        yield (
            f"engine.reduce_dtype={engine.reduce_dtype} is DeepSpeed's, and engine=ddp sums its float32 gradients as "
            "they are; use engine.reduce_dtype=fp32, or engine=zero1"
        )


def _diffusion_conflicts(config: Config) -> Iterator[str]:
    model, diffusion = config.model, config.diffusion
    if not model.is_diffusion:
        return
    if config.retrieval.enabled:
        yield "model.family=dit takes no retrieved documents; set retrieval=none"
    if config.image_tokenizer.quantizer != "fsq":
        yield (
            f"model.family=dit learns latents that fsq bounds, and image_tokenizer.quantizer="
            f"{config.image_tokenizer.quantizer} has no bound; use image_tokenizer=fsq"
        )
    for name, corpus in config.sources.items():
        if corpus.tokens:
            yield f"model.family=dit needs the pictures of corpus {name}, which gives token shards alone (tokens=...)"
    for key, value, only in (
        ("kv_heads", model.kv_heads, (0, model.heads)),
        ("ffn_width", model.ffn_width, (0, 4 * model.width)),
        ("attention", model.attention, ("auto", "sdpa")),
        ("weights", model.weights, (None,)),
        ("picture_grid", model.picture_grid, (0,)),
    ):
        if value not in only:
            yield f"model.{key}={value} is for decoders of tokens; model.family=dit takes {only[0]}"
    if model.width % 4:
        yield f"model.width={model.width} must be a multiple of 4 for the positions of model.family=dit"
    grid = config.corpus.image_size // config.image_tokenizer.downsample
    if grid % diffusion.patch_size:
        yield f"diffusion.patch_size={diffusion.patch_size} does not divide the {grid} latent cells of a picture's side"
    if config.engine.stage == "auto":
        yield "engine.stage=auto estimates the memory of decoders, not of model.family=dit; set a stage from 0 to 3"
    samplers = ("flow_euler",) if diffusion.objective == "rectified_flow" else ("ddim", "dpm_solver")
    if diffusion.sampler not in ("auto", *samplers):
        yield (
            f"diffusion.sampler={diffusion.sampler} does not fit diffusion.objective={diffusion.objective}; "
            f"use {' or '.join(samplers)}"
        )


def _sequence_conflicts(config: Config) -> Iterator[str]:
    model, length = config.model, config.stream.sequence_length
    if model.width % model.heads:
        yield f"model.width={model.width} is not a multiple of model.heads={model.heads}"
    elif model.rotary and model.head_size % 2:
        yield (
            f"model.family={model.family} turns pairs, so width / heads must be even: it is "
            f"{model.head_size}; change model.width or model.heads"
        )
    elif model.heads % model.num_kv_heads:
        yield f"model.heads={model.heads} is not a multiple of model.kv_heads={model.kv_heads}; change one"
    if model.norm_after and model.family != "chameleon":
        yield f"model.norm_after is Chameleon's; model.family={model.family} has its norms in front"
    elif model.norm_after and model.dropout:
        yield (
            f"model.dropout={model.dropout} and model.norm_after=true do not mix (Chameleon, sec. 2.3); "
            "set model.dropout=0, or model.norm_after=false"
        )
    if model.attention == "varlen" and config.engine.dtype == "fp32":
        yield (
            "model.attention=varlen computes in bf16, but engine.dtype=fp32; set engine.dtype=bf16, "
            "or model.attention=auto"
        )
    if model.attention == "varlen" and (model.head_size % 8 or model.head_size > 256):
        yield (
            f"model.attention=varlen needs heads of a multiple of 8 up to 256 channels, not {model.head_size}; "
            "change model.heads, or set model.attention=auto"
        )
    if model.attention == "flex" and model.head_size < 16:
        yield (
            f"model.attention=flex needs heads of at least 16 channels, not {model.head_size}; "
            "change model.heads, or set model.attention=auto"
        )
    if model.max_positions and model.max_positions < length:
        yield (
            f"model.max_positions={model.max_positions} is shorter than stream.sequence_length={length}; "
            "0 makes them equal"
        )
    tokens_per_image = (config.corpus.image_size // config.image_tokenizer.downsample) ** 2
    if model.picture_grid and model.picture_grid**2 != tokens_per_image:
        yield (
            f"model.picture_grid={model.picture_grid} is not the grid of these pictures; set it to -1, "
            "which finds their own, or to 0 for no rows and columns"
        )
    if length < tokens_per_image + SHORTEST_CAPTION:
        yield (
            f"stream.sequence_length={length} cannot hold one picture ({tokens_per_image} tokens) and its caption; "
            f"at least {tokens_per_image + SHORTEST_CAPTION} is needed, or a smaller corpus.image_size"
        )
    retrieval = config.retrieval
    if retrieval.enabled and retrieval.num_documents > 2 * retrieval.num_candidates:
        yield (
            f"retrieval.num_documents={retrieval.num_documents} asks for more documents than "
            f"retrieval.num_candidates={retrieval.num_candidates} by text and as many by picture give"
        )
    if retrieval.enabled and retrieval.encoder == "clip" and not retrieval.encoder_path:
        yield "retrieval.encoder=clip needs retrieval.encoder_path: a folder or hub id of a CLIP or SigLIP model"
    objective = config.objective
    if objective.min_masks > objective.num_sentinels:
        yield (
            f"objective.min_masks={objective.min_masks} needs as many sentinels, but "
            f"objective.num_sentinels={objective.num_sentinels}"
        )

"""`mmtrain flops count`: FLOPs of a model configuration by module and convention, or of a diffusion network."""

import math
from typing import TYPE_CHECKING

from mmtrain.config import Config, UserError
from mmtrain.config.compose import compose
from mmtrain.config.listing import groups
from mmtrain.config.suggest import did_you_mean, nearest
from mmtrain.verbs.flops import new_table, print_rows, print_table

if TYPE_CHECKING:
    from mmtrain.tokens import Vocabulary


def count(argv: list[str]) -> int:
    """count [MODEL] [settings], or count NETWORK [resolution=N] [text_tokens=N]."""
    from mmtrain.flops.diffusion_networks import NETWORKS

    name, settings = (argv[0], argv[1:]) if argv and "=" not in argv[0] and not argv[0].startswith("-") else ("", argv)
    if name in NETWORKS:
        return _count_network(name, settings)
    if name:
        sizes = list(groups()["model"])
        if name not in sizes:
            close = nearest(name, [*sizes, *NETWORKS])
            hint = did_you_mean(close) if close else "`mmtrain ls model` lists the sizes"
            raise UserError(f"{name} is neither a model of mmtrain nor a diffusion network it knows; {hint}")
        settings = [f"model={name}", *settings]
    return _count_model(compose(settings))


def _count_model(config: Config) -> int:
    """Parameters and training FLOPs of a configuration, for sequences that are full of one document."""
    from mmtrain.flops import flops_by_module, matmul_parameters, step_flops
    from mmtrain.models.registry import count_parameters

    model, length = config.model, config.stream.sequence_length
    vocabulary = vocabulary_of(config)
    is_dense = model.attention not in ("flex", "varlen")
    step = step_flops(model, vocabulary.size, [length], 1, length, dense_attention=is_dense)
    parameters = count_parameters(model, vocabulary.size, model.max_positions or length)
    matmul = matmul_parameters(model, vocabulary.size)
    tokens = config.stream.global_batch * length * config.train.steps
    print(f"{model.family}: {model.layers} layers of width {model.width}, {length} tokens, {vocabulary.size:,} ids")
    print_rows([("parameters", f"{parameters:,}"), ("of which in matrix products", f"{matmul:,}")])
    print("training FLOPs per token by module, causal, one document per sequence")
    scores = 2 * model.layers * model.width * length**2
    table = new_table("  module", "forward", "backward", "recomputed", "share")
    modules = flops_by_module(model, vocabulary.size, length, scores)
    for name, each in modules.items():
        numbers = (f"{flops / length:.4g}" for flops in (each.forward, each.backward, each.recompute))
        table.add_row(f"  {name.replace('_', ' ')}", *numbers, f"{100 * each.model / step.model_causal:.1f} %")
    print_table(table)
    print("training FLOPs per token by convention, forward and backward")
    recomputation = ", recomputation" if model.activation_checkpointing else ""
    rows = (
        ("model, causal", step.model_causal),
        ("model, PaLM (full attention)", step.model_palm),
        ("6 N", 6 * matmul * length),
        (f"hardware ({'dense' if is_dense else 'causal'} scores{recomputation})", step.hardware),
    )
    print_rows((label, f"{flops / length:.4g}") for label, flops in rows)
    print(f"whole run: {config.train.steps:,} steps of {config.stream.global_batch} sequences = {tokens:,} tokens")
    print_rows([("model, causal (packed documents: less)", f"{step.model_causal / length * tokens:.4g}")])
    return 0


def _count_network(name: str, words: list[str]) -> int:
    """Forward and training FLOPs of a diffusion network per image, with VAE and text encoders apart."""
    from mmtrain.flops.diffusion_networks import NETWORKS, count_network, count_vae

    network = NETWORKS[name]
    given = dict(word.partition("=")[::2] for word in words)
    for key, value in given.items():
        if key not in ("resolution", "text_tokens") or not value.isdecimal():
            raise UserError(f"{key}={value}: a diffusion network takes resolution=PIXELS and text_tokens=NUMBER")
    resolution = int(given.get("resolution", network.resolutions[-1]))
    tokens = int(given["text_tokens"]) if "text_tokens" in given else None
    counted = count_network(name, resolution, tokens)
    text = network.text_tokens if tokens is None else tokens
    print(f"{network.name} at {resolution} pixels, {text} text tokens ({network.kind} on torch's meta device)")
    rows = [
        ("parameters of the network", f"{counted.parameters:,}"),
        ("forward, FLOPs per image", f"{counted.forward:,}"),
        ("  of it attention (products of scores)", f"{counted.attention:,}"),
        ("  as GMACs (what papers print as Gflops)", f"{counted.forward / 2e9:,.2f}"),
    ]
    if counted.vae_encode is not None:
        encode, decode, parameters = count_vae(resolution, network.vae)
        rows += [
            (f"VAE encode, frozen ({parameters:,} parameters)", f"{encode:,}"),
            ("VAE decode, for sampling only", f"{decode:,}"),
        ]
    rows += [(f"{encoder}, per caption", f"{number:,}") for encoder, number in counted.text.items()]
    rows += [
        ("training step of the network (3 x forward)", f"{3 * counted.forward:,}"),
        ("with one forward pass of what is frozen", f"{counted.training_step:,}"),
        ("  share of what is frozen", f"{100 * counted.frozen / counted.training_step:.1f} %"),
    ]
    print_rows(rows)
    print(
        "1 multiply-add = 2 FLOPs; norms, softmax and elementwise work are not counted"
        + (f"; {network.remark}" if network.remark else "")
    )
    return 0


def vocabulary_of(config: Config) -> "Vocabulary":
    """The vocabulary that `config` leads to, when both tokenizers are trained to their full size."""
    from mmtrain.tokens.vocabulary import Vocabulary

    pictures = config.image_tokenizer
    codes = math.prod(pictures.levels) if pictures.quantizer == "fsq" else pictures.codebook_size
    return Vocabulary(config.text_tokenizer.vocab_size, codes, config.objective.num_sentinels)

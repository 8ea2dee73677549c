"""Models of transformers with random weights and tokenizers like those that are out there, saved as folders."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mmtrain.config import TextTokenizerConfig
from mmtrain.tokens import TextTokenizer

POSITIONS = 232
SENTENCES = [f"a {color} {thing} on the {place}" for color in ("red", "blue", "dark green")
             for thing in ("circle", "little house", "dog") for place in ("left", "right", "table")]  # fmt: skip


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Weights that all matter: norms near 1, the rest large enough that the answers differ."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        gain = "norm" in name and name.endswith("weight")
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + gain)


def byte_level(special: dict[str, int]) -> Tokenizer:
    """BPE as OPT, Llama 3 and Chameleon have it, with `special` tokens at their ids."""
    trained = json.loads(TextTokenizer.train(SENTENCES, TextTokenizerConfig(vocab_size=280))._tokenizer.to_str())
    free = iter(sorted(set(range(280 + len(special))) - set(special.values())))
    vocab = {token: next(free) for token in sorted(trained["model"]["vocab"], key=trained["model"]["vocab"].get)}
    trained["model"]["vocab"] = vocab | special
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    trained["added_tokens"] = [{"id": id, "content": name, **flags} for name, id in special.items()]
    return Tokenizer.from_str(json.dumps(trained))


def metaspace(special: dict[str, int]) -> Tokenizer:
    """BPE as Llama 2 has it: blanks as U+2581, bytes for what it does not know."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    names = [*sorted(special, key=special.__getitem__), *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(content))


LLAMA = {"<unk>": 0, "<s>": 1, "</s>": 2}
CHAMELEON = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<eoss>": 20, "<racm3:break>": 21, "<reserved08706>": 22}
CODES = ("A", "J", "BA", "C", "D", "E", "F", "G", "H", "I", "B")  # 0, 9, 10, 2, ...: not in the order of their ids
CHAMELEON |= {f"IMGIMG{letters}Z": 4 + i for i, letters in enumerate(CODES)}
FOREIGN: dict[str, tuple[Callable, dict, dict]] = {
    "opt": (byte_level, {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}, {"word_embed_proj_dim": 32, "ffn_dim": 48}),
    "llama": (metaspace, LLAMA, {"num_key_value_heads": 4, "intermediate_size": 48, "rms_norm_eps": 1e-6}),
    "llama-gqa": (metaspace, LLAMA, {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}),
    "chameleon": (byte_level, CHAMELEON, {"num_key_value_heads": 2, "intermediate_size": 48}),
    "chameleon-swin": (byte_level, CHAMELEON, {"num_key_value_heads": 4, "intermediate_size": 48, "swin_norm": True}),
}
NAMED = ("llama", "chameleon", "chameleon-swin")  # name their specials; the others have ids in config.json alone
ROWS = 344  # more than the tokenizers have entries: rows that pad the matrix


def foreign_source(name: str, folder: Path, dtype: str = "float32", **changes) -> tuple[torch.nn.Module, Tokenizer]:
    """A model of transformers with random weights, saved as transformers saves it, and its tokenizer."""
    import transformers

    make, special, settings = FOREIGN[name]
    shared = {"vocab_size": ROWS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "max_position_embeddings": POSITIONS, "bos_token_id": special["<s>"], "eos_token_id": special["</s>"],
              "pad_token_id": special.get("<pad>")}  # fmt: skip
    settings = shared | settings | changes
    tokenizer = make(special)
    if name == "opt":
        settings = {"enable_bias": False, "layer_norm_elementwise_affine": False, "dropout": 0.0} | settings
        model = transformers.OPTForCausalLM(transformers.OPTConfig(**settings))
    elif name.startswith("llama"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    else:
        encoder = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "embed_dim": 4,
                   "latent_channels": 4, "num_embeddings": 11}  # fmt: skip
        settings |= {"bos_token_id": 1, "pad_token_id": None}  # as published, though 1 is <pad> and <s> is 0
        settings |= {"vocabulary_map": tokenizer.get_vocab(), "vq_config": encoder}
        model = transformers.ChameleonForConditionalGeneration(transformers.ChameleonConfig(**settings))
    randomize(model)
    model.to(getattr(torch, dtype)).eval().save_pretrained(folder, max_shard_size="30KB")
    tokenizer.save(str(folder / "tokenizer.json"))
    names: dict = {"unk_token": "<unk>"}
    if name in NAMED:
        names |= {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return model, tokenizer

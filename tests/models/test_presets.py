"""The models of `conf/model` have the published numbers of parameters; nothing is allocated."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from mmtrain.config import ModelConfig
from mmtrain.flops import matmul_parameters
from mmtrain.models import FAMILIES, count_parameters

PRESETS = Path(__file__).parents[2] / "conf" / "model"
RUNGS = {"small": 39.5e6, "125m": 85e6, "350m": 305e6, "1b": 1.22e9}
# Touvron et al. 2023, table 2, cut after the digits that it gives; vocabulary of 32,000.
LLAMA = {"llama_7b": 6.7, "llama_13b": 13.0, "llama_33b": 32.5, "llama_65b": 65.2}
# Of the released weights; vocabulary of 32,000.
LLAMA2 = {"llama2_7b": 6_738_415_616, "llama2_13b": 13_015_864_320, "llama2_70b": 68_976_648_192}
# Yu et al. 2023, table 3; the vocabulary of 66k of the released code, 4096 learned positions, tied embeddings.
CM3LEON = {"cm3leon_350m": 0.37e9, "cm3leon_760m": 0.79e9, "cm3leon_7b": 6.73e9}


def preset(name: str) -> ModelConfig:
    return ModelConfig(**OmegaConf.load(PRESETS / f"{name}.yaml"))


@pytest.mark.parametrize("name", CM3LEON)
def test_cm3leon_has_the_published_sizes(name: str) -> None:
    model, vocabulary = preset(name), 66_048
    parameters = count_parameters(model, vocabulary, 4096)
    assert round(parameters, -7) == CM3LEON[name]
    # 12 d^2 per block and no bias or norm parameter.
    assert parameters == 12 * model.layers * model.width**2 + (vocabulary + 4096) * model.width


@pytest.mark.parametrize("name", LLAMA)
def test_llama_has_the_published_sizes(name: str) -> None:
    assert count_parameters(preset(name), 32_000, 2048) // 10**8 / 10 == LLAMA[name]


@pytest.mark.parametrize("name", LLAMA2)
def test_llama_2_has_the_parameters_of_the_released_weights(name: str) -> None:
    assert count_parameters(preset(name), 32_000, 4096) == LLAMA2[name]


@pytest.mark.parametrize(("name", "published"), [("chameleon_7b", 7.04), ("chameleon_34b", None)])
def test_chameleon_has_the_parameters_of_transformers(name: str, published: float | None) -> None:
    """The 7.04 B of the released 7B count the encoder of pictures (29 M), which is no part of our decoder."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration  # noqa: PLC0415

    ours, vocabulary = preset(name), 65_536
    config = ChameleonConfig(
        vocab_size=vocabulary,
        hidden_size=ours.width,
        intermediate_size=ours.ffn_width,
        num_hidden_layers=ours.layers,
        num_attention_heads=ours.heads,
        num_key_value_heads=ours.num_kv_heads,
        tie_word_embeddings=False,
        swin_norm=ours.norm_after,
        vocabulary_map={"<image>": 8711, "IMGIMGAZ": 4},
    )
    with torch.device("meta"):
        theirs = ChameleonForConditionalGeneration(config)
    encoder = sum(p.numel() for p in theirs.model.vqmodel.parameters())
    total = sum(p.numel() for p in theirs.parameters())
    assert count_parameters(ours, vocabulary, 4096) == total - encoder
    assert published is None or round(total / 1e9, 2) == published
    assert name != "chameleon_34b" or total // 10**9 == 34


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_rungs_of_a_ladder(family: str) -> None:
    """Parameters of the blocks; the tiny models are as deep as each family learns best on a laptop."""
    assert preset(f"{family}_tiny").family == family
    for rung, blocks in RUNGS.items():
        model = preset(f"{family}_{rung}")
        assert model.family == family and model.tie_embeddings
        assert matmul_parameters(model, 0) == pytest.approx(blocks, rel=0.05)


def test_every_preset_of_a_family_is_named_for_it() -> None:
    for path in PRESETS.glob("*_*.yaml"):
        assert path.stem.startswith(preset(path.stem).family)
        assert preset(path.stem).activation_checkpointing == (matmul_parameters(preset(path.stem), 0) > 2e8)

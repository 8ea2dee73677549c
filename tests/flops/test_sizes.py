"""The closed form of every family and size in conf/model against torch's counter on the meta device."""

from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mmtrain.config import ModelConfig
from mmtrain.flops import flops_by_module, step_flops
from mmtrain.flops.counter import count_of_depth, count_training_step

V, LENGTH = 65_536, 4096
FILES = sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))
SIZES = {
    file.stem: ModelConfig(**content)
    for file in FILES
    # Not the short names of other sizes, nor the diffusion baseline, whose count has a test of its own.
    if "defaults" not in (content := OmegaConf.to_container(OmegaConf.load(file))) and content["family"] != "dit"
}


@pytest.mark.parametrize("size", SIZES)
def test_closed_form_is_what_torch_counts(size):
    model = SIZES[size]
    counted = count_of_depth(model, V, LENGTH)["all"]
    assert step_flops(model, V, [LENGTH], 1, LENGTH).hardware == pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize("size", ["cm3leon_7b", "chameleon_34b", "llama2_70b"])
def test_every_module_is_what_torch_counts(size):
    # The counter books recomputed products under the wrong module, so here nothing is recomputed.
    model = replace(SIZES[size], activation_checkpointing=False)
    counted = count_of_depth(model, V, LENGTH)
    scores = 4 * model.layers * model.width * LENGTH**2
    for name, module in flops_by_module(model, V, LENGTH, scores).items():
        assert module.model == pytest.approx(counted.get(name, 0), rel=1e-3), name


def test_layers_cost_the_same_each():
    model = replace(SIZES["llama2_70b"], layers=9)
    assert count_of_depth(model, V, 64) == count_training_step(model, V, 64)


def test_sizes_were_found():
    assert len(SIZES) >= 26 and {model.family for model in SIZES.values()} == {"cm3leon", "chameleon", "llama"}

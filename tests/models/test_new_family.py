"""The worked example of docs/how-to/new-family.md: registered, trained by the real loop, and checked."""

import re
import types
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from mmtrain.models import FAMILIES, build_model, count_parameters
from tests.train import small_run

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "new-family.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The page's Python as one module, which registers its family for this test alone."""
    monkeypatch.setitem(FAMILIES, "palm", None)  # so that it is taken out again
    module = types.ModuleType("palm")
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, str(PAGE), "exec"), vars(module))
    return module


def preset() -> dict:
    (text,) = (block for language, block in BLOCKS if language == "yaml")
    return OmegaConf.to_container(OmegaConf.create(text))


def test_it_learns_in_the_real_loop(page: types.ModuleType, tmp_path: Path) -> None:
    config = small_run.small_config(30, **preset())
    rows = small_run.train(config, tmp_path)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5 and rows[-1]["val_loss"] < rows[0]["loss"] - 0.5


def test_its_documents_and_its_cache_pass_the_check_of_the_page(page: types.ModuleType) -> None:
    config = small_run.small_config(1, **preset(), zero_init_outputs=False)
    config.model.init_std = 0.2
    page.check_family(small_run.new_model(config), small_run.VOCABULARY.size)


def test_the_check_of_the_page_finds_what_it_promises(page: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run.small_config(1, **preset(), zero_init_outputs=False)
    config.model.init_std = 0.2

    class Leaky(page.ParallelBlock):
        def forward(self, x, packing, rotary, cache=None, layer=0):
            return super().forward(x, packing, rotary, cache, layer) + x.mean(1, keepdim=True)

    monkeypatch.setattr(page, "ParallelBlock", Leaky)
    model = build_model(config.model, small_run.VOCABULARY.size, 64)
    model.initialize(0)
    with pytest.raises(AssertionError, match="the change of token"):
        page.check_family(model, small_run.VOCABULARY.size)


def test_its_parameters_are_counted(page: types.ModuleType) -> None:
    config = small_run.small_config(1, **preset()).model
    block = (64 + 2 * 16) * 64 + 64 * 64 + 3 * 64 * config.feed_forward_width + 64
    assert count_parameters(config, 100, 64) == 2 * block + 100 * 64 + 64
    with torch.device("meta"):
        assert build_model(config, 100, 64).blocks[0].attention.kv_heads == 1

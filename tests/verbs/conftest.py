"""A small prepared corpus that the verbs which look at data share."""

import pytest

from mmtrain.config import Config
from mmtrain.config.compose import compose
from mmtrain.verbs.prepared import PreparedCorpus, open_corpus


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, PreparedCorpus]:
    """64 training and 16 validation scenes with tokens and neighbours, and their configuration."""
    folder = tmp_path_factory.mktemp("data")
    config = compose(["experiment=smoke", "image_tokenizer.steps=2", f"data_dir={folder}"])
    return config, open_corpus(config, with_neighbours=True)

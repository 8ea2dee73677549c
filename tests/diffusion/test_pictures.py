"""The prepared artifact: one caption and one picture per document, each in its place."""

from pathlib import Path

import numpy as np
import pytest

from mmtrain.config import UserError
from mmtrain.diffusion import pad_captions
from mmtrain.shards import TokenShards, write_tokens
from mmtrain.tokens import TokenDocument, TokenSegment
from mmtrain.verbs.pictures import _captions, _statistics
from tests.diffusion.conftest import Corpus, document
from tests.train.small_run import VOCABULARY


def test_captions_are_found_by_document(corpus: Corpus, tmp_path: Path) -> None:
    shards = TokenShards(corpus.folder / "tokens-train")
    assert _captions(shards, "small/train", tmp_path) == 40
    assert np.array_equal(np.load(tmp_path / "captions.npy"), np.load(corpus.folder / "train" / "captions.npy"))
    assert np.array_equal(np.load(tmp_path / "starts.npy"), np.load(corpus.folder / "train" / "starts.npy"))


def test_a_document_of_another_form_is_refused_by_name(tmp_path: Path) -> None:
    good = document("train", 0)
    text_alone = TokenDocument("page-7", good.tokens[:2], (TokenSegment("text", 0, 2),), {})
    write_tokens(tmp_path / "tokens", [good, text_alone], VOCABULARY, "text", "image")
    with pytest.raises(UserError, match="document page-7 of pages holds text"):
        _captions(TokenShards(tmp_path / "tokens"), "pages", tmp_path)


def test_statistics_are_those_of_each_channel() -> None:
    latents = np.random.default_rng(0).normal(3.0, 2.0, (50, 2, 3, 3)).astype(np.float32)
    mean, std = _statistics(latents)
    assert np.allclose(mean, latents.mean((0, 2, 3)), atol=1e-5) and np.allclose(std, latents.std((0, 2, 3)), atol=1e-5)


def test_padding() -> None:
    ids, length = pad_captions([np.array([5, 6]), np.array([], np.int64)])
    assert ids.tolist() == [[5, 6], [0, 0]] and length.tolist() == [2, 1]

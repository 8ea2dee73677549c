"""The dual encoder: it learns what belongs together, is the same when loaded again, and says what it cannot do."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtrain.config import RetrievalConfig, UserError
from mmtrain.documents import Document, decode_square
from mmtrain.retrieval import Memory, Neighbours, build_neighbours, open_encoder
from mmtrain.retrieval.dual import DualEncoder
from mmtrain.retrieval.dual_training import Pairs, contrastive_loss, train_dual
from tests.retrieval.conftest import COLORS, pair

CONFIG = RetrievalConfig(encoder="dual", dimension=32, dual_steps=40, dual_batch=32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict, list[float]]:
    losses: list[float] = []
    out = tmp_path_factory.mktemp("encoder")
    held_out = [pair(i, "held-out") for i in range(200, 240)]
    metrics = train_dual(map(pair, range(120)), held_out, CONFIG, out, 0, lambda step, row: losses.append(row["loss"]))
    return out, metrics, losses


def test_the_loss_falls_and_held_out_pictures_are_found(trained) -> None:
    _, metrics, losses = trained
    assert losses[-1] < 0.75 * np.log(CONFIG.dual_batch)  # all pairs alike
    # 40 pictures of 4 colors: who knows the color finds the picture among the 5 best in half the cases.
    assert metrics["held_out"] == 40 and metrics["r@5"] > 2 * 5 / 40
    assert metrics["flops"] > 3 * 40 * 32 * 2 * 512 * (32 + 128)


def test_a_color_is_nearer_to_its_pictures_than_to_others(trained) -> None:
    encoder = open_encoder(replace(CONFIG, encoder_path=str(trained[0])))
    pixels = [decode_square(pair(i).images[0].data, encoder.picture_size) for i in range(300, 320)]
    scores = encoder.encode_texts(list(COLORS)) @ encoder.encode_pictures(np.stack(pixels)).T
    assert np.mean(scores.argmax(0) == np.arange(20) % 4) > 0.7
    assert encoder.flops == 4 * 2 * 512 * (128 + 32) + 20 * 2 * 512 * (768 + 32)


def test_a_saved_encoder_is_the_same_and_another_seed_is_another(trained, tmp_path) -> None:
    train_dual(map(pair, range(120)), map(pair, range(200, 240)), CONFIG, tmp_path, 1)
    first, again, other = DualEncoder(trained[0]), DualEncoder(trained[0]), DualEncoder(tmp_path)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    vectors = first.encode_texts(["a red wall", "", "?!"])
    assert np.array_equal(vectors, again.encode_texts(["a red wall", "", "?!"]))
    assert not vectors[1:].any() and np.isclose(np.linalg.norm(vectors[0]), 1, atol=1e-5)


def test_others_of_a_cluster_are_no_negatives() -> None:
    documents = [replace(pair(i), meta={"cluster": i // 2}) for i in range(4)]
    pairs = Pairs.of(documents, 10)
    same = pairs.same(np.array([0, 1, 2]))
    assert same.tolist() == [[False, True, False], [True, False, False], [False, False, False]]
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0]]), dim=1)
    scale = torch.tensor(3.0)
    assert contrastive_loss(vectors, vectors, scale, same) < contrastive_loss(vectors, vectors, scale, same & False)


def test_neighbours_are_found_with_it(trained, shards, tmp_path) -> None:
    shards("train", (pair(i) for i in range(40)))
    config = replace(CONFIG, encoder_path=str(trained[0]), max_score=1.0)
    build_neighbours({"train": tmp_path / "train"}, config, tmp_path / "out", 0)
    found = Neighbours(tmp_path / "out" / "train")
    assert all(len(found.candidates(i)) for i in range(len(found)))
    memory = Memory(tmp_path / "out" / "memory")
    assert len(memory.search("a photograph of a zebra before a red wall", None, 2)) == 2
    with pytest.raises(UserError, match="has vectors of 32 numbers by the encoder dual-"):
        Memory(memory.folder, open_encoder(RetrievalConfig(dimension=32)))


def test_documents_that_are_no_pairs_and_a_loss_that_is_not_finite_are_refused(tmp_path) -> None:
    texts = [Document(f"text-{i}", "test", ("only words",), {}) for i in range(20)]
    with pytest.raises(UserError, match="has 0 training documents with both words and a picture"):
        train_dual(texts, texts, CONFIG, tmp_path, 0)
    pairs = [pair(i) for i in range(20)]
    with pytest.raises(UserError, match=r"not finite at step \d+; lower retrieval.dual_lr=1e\+30"):
        train_dual(pairs, pairs, replace(CONFIG, dual_lr=1e30), tmp_path, 0)


def test_a_folder_without_an_encoder_is_refused(trained, tmp_path) -> None:
    with pytest.raises(UserError, match="holds no dual encoder"):
        DualEncoder(tmp_path)
    for file in trained[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    with pytest.raises(UserError, match="holds no dual encoder"):
        DualEncoder(tmp_path)

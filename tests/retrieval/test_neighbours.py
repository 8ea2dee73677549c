import json
from dataclasses import replace

import numpy as np
import pytest

from mmtrain.config import RetrievalConfig, UserError
from mmtrain.documents import Document, decode_square
from mmtrain.retrieval import Memory, Neighbours, build_neighbours
from mmtrain.retrieval.search import exact_search
from tests.retrieval.conftest import ANIMALS, COLORS, pair, picture

CONFIG = RetrievalConfig(num_candidates=4)
N = 40


def test_related_documents_are_found_and_never_oneself(shards, tmp_path):
    train = shards("train", map(pair, range(N)))
    build_neighbours(train, train, CONFIG, tmp_path / "out", seed=0)
    neighbours = Neighbours(tmp_path / "out")
    assert len(neighbours) == N
    related = []
    for i in range(N):
        candidates, scores = neighbours.candidates(i), neighbours.scores(i)
        assert i not in candidates and len(set(candidates.tolist())) == len(candidates) == 4
        assert (np.diff(scores) <= 0).all() and scores.max() <= CONFIG.max_score
        related += [(c - i) % 4 == 0 or (c - i) % 5 == 0 for c in candidates.tolist()]
    assert np.mean(related) > 0.9  # 0.4 by chance
    assert json.loads((tmp_path / "out/neighbours.json").read_text())["left_out"]["self"] == N


def test_planted_duplicates_are_excluded(shards, tmp_path):
    original = pair(3)
    same_picture = Document("same-picture", "test", ("quite another caption", original.segments[1]), {})
    near = picture("yellow", 3, size=33)  # other bytes, hardly another look
    near_duplicate = Document("near-duplicate", "test", (original.segments[0], near), {})
    train = shards("train", [*map(pair, range(N)), same_picture, near_duplicate])
    build_neighbours(train, train, CONFIG, tmp_path / "out", seed=0)
    neighbours = Neighbours(tmp_path / "out")
    left_out = neighbours.facts["left_out"]
    assert left_out["same_picture"] >= 2
    for i in range(len(train)):
        sha = {image.sha256 for image in train[i].images}
        found = [train[int(c)] for c in neighbours.candidates(i)]
        pictures = [image.sha256 for document in found for image in document.images]
        assert not sha & set(pictures) and len(set(pictures)) == len(pictures)
    assert N not in neighbours.candidates(3)


def test_documents_of_ones_own_cluster_are_excluded(shards, tmp_path):
    documents = [pair(i) for i in range(N)]
    documents = [replace(document, meta={"cluster": i // 2}) for i, document in enumerate(documents)]
    train = shards("train", documents)
    build_neighbours(train, train, RetrievalConfig(num_candidates=N, max_score=1.0), tmp_path / "out", seed=0)
    neighbours = Neighbours(tmp_path / "out")
    assert neighbours.facts["left_out"]["same_cluster"] == N
    assert all(set(range(N)) - set(neighbours.candidates(i).tolist()) == {i, i ^ 1} for i in range(N))


def test_near_duplicates_are_excluded_among_neighbours_too(shards, tmp_path):
    def copy(number: int) -> Document:
        return Document(f"copy-{number}", "test", (f"a turtle swims in the sea {number}", picture("green", number)), {})

    train = shards("train", [*map(pair, range(N)), *map(copy, range(30))])
    low = RetrievalConfig(num_candidates=4, max_score=0.6, query_dropout=0.0)
    build_neighbours(train, train, low, tmp_path / "out", seed=0)
    vectors = np.load(tmp_path / "out/vectors.npy").astype(np.float32)
    neighbours = Neighbours(tmp_path / "out")
    for i in range(len(train)):
        chosen = neighbours.candidates(i)
        own = vectors[chosen] @ vectors[[i, *chosen]].T
        np.fill_diagonal(own[:, 1:], -1)
        assert own.max(initial=-1) <= 0.6 + 2e-3  # stored in half precision
    assert neighbours.facts["left_out"]["near_duplicate_of_another_neighbour"] > 0


def test_validation_documents_find_training_documents(shards, tmp_path):
    train, held_out = shards("train", map(pair, range(N))), shards("held_out", [pair(i, "val") for i in range(50, 60)])
    build_neighbours(train, train, CONFIG, tmp_path / "train_out", seed=0)
    build_neighbours(train, held_out, CONFIG, tmp_path / "encoded_again", seed=0)
    build_neighbours(train, held_out, CONFIG, tmp_path / "reused", seed=0, encoded=tmp_path / "train_out")
    again, reused = Neighbours(tmp_path / "encoded_again"), Neighbours(tmp_path / "reused")
    assert len(again) == 10
    for i in range(10):
        assert set(again.candidates(i)) == set(reused.candidates(i))
        assert again.candidates(i).max() < N


def test_building_is_a_pure_function_of_seed_and_documents(shards, tmp_path):
    train = shards("train", map(pair, range(N)))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_neighbours(train, train, CONFIG, tmp_path / name, seed)
    a, b, c = (np.load(tmp_path / name / "neighbours.npy") for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)  # another seed drops other words


@pytest.mark.parametrize("count", [1, 3])
def test_a_memory_smaller_than_the_wish_gives_what_it_has(shards, tmp_path, count):
    train, queries = shards("train", map(pair, range(count))), shards("queries", [pair(7, "query")])
    build_neighbours(train, queries, CONFIG, tmp_path / "out", seed=0)
    neighbours, memory = Neighbours(tmp_path / "out"), Memory(tmp_path / "out")
    assert sorted(neighbours.candidates(0).tolist()) == list(range(count))
    assert len(neighbours.scores(0)) == count
    assert sorted(memory.search_text("a zebra", 4)) == list(range(count))


def test_memory_answers_texts_and_pictures(shards, tmp_path):
    train = shards("train", map(pair, range(N)))
    build_neighbours(train, train, CONFIG, tmp_path / "out", seed=0)
    memory = Memory(tmp_path / "out")
    for number, animal in enumerate(ANIMALS):
        found = memory.search_text(f"the {animal}", 3)
        assert len(found) == 3 and all(i % 5 == number for i in found)
    for number, color in enumerate(COLORS):
        found = memory.search_image(decode_square(picture(color, 999).data, 48), 3)
        assert sum(i % 4 == number for i in found) >= 2


def test_an_empty_memory_has_no_neighbours():
    scores, indices = exact_search(np.zeros((0, 8), np.float32), np.ones((3, 8), np.float32), 4)
    assert scores.shape == indices.shape == (3, 0)


def test_vectors_that_are_not_finite_are_the_users_to_mend():
    vectors = np.eye(4, dtype=np.float32)
    broken = vectors.copy()
    broken[2, 1] = np.nan
    with pytest.raises(UserError, match="memory vector of document 2"):
        exact_search(broken, vectors, 2)
    with pytest.raises(UserError, match="query vector of document 2"):
        exact_search(vectors, broken, 2)


def test_a_damaged_artifact_is_refused(shards, tmp_path):
    train = shards("train", map(pair, range(5)))
    out = tmp_path / "out"
    build_neighbours(train, train, CONFIG, out, seed=0)
    np.save(out / "neighbours.npy", np.zeros((3, 4), np.int64))
    with pytest.raises(UserError, match="3 rows"):
        Neighbours(out)
    (out / "neighbours.json").unlink()
    with pytest.raises(UserError, match="cannot read"):
        Memory(out)

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmtrain.config import RetrievalConfig, UserError
from mmtrain.documents import Document, decode_square
from mmtrain.retrieval import Memory, Neighbours, build_neighbours, window_document
from mmtrain.retrieval.build import run_here
from mmtrain.retrieval.encode import IMAGE, TEXT
from tests.retrieval.conftest import ANIMALS, COLORS, pair, picture

CONFIG = RetrievalConfig(num_candidates=4)
N = 40


def build(out: Path, train, config=CONFIG, seed=0, validation=None, **options) -> Neighbours:
    documents = {"train": train.store.location} | ({"validation": validation.store.location} if validation else {})
    build_neighbours({split: Path(folder) for split, folder in documents.items()}, config, out, seed, **options)
    return Neighbours(out / ("validation" if validation else "train"))


def test_related_documents_are_found_and_never_oneself(shards, tmp_path):
    neighbours = build(tmp_path / "out", shards("train", map(pair, range(N))))
    assert len(neighbours) == N
    related = {TEXT: [], IMAGE: []}
    for i in range(N):
        candidates, scores = neighbours.candidates(i), neighbours.scores(i)
        assert i not in candidates and len(set(candidates.tolist())) == len(candidates) >= 4
        assert (np.diff(scores) <= 0).all() and scores.max() <= CONFIG.max_score
        for channel, steps in ((TEXT, (4, 5)), (IMAGE, (4,))):
            found = [hit.number for hit in neighbours.hits(i, channel) if not hit.reason]
            assert set(found) <= set(candidates.tolist())
            related[channel] += [any((number - i) % step == 0 for step in steps) for number in found]
    assert np.mean(related[TEXT]) > 0.9  # of the same animal or color, as captions say both: 0.4 by chance
    assert np.mean(related[IMAGE]) > 0.9  # of the same color: 0.25 by chance
    assert N < neighbours.facts["left_out"]["self"] <= 2 * N


def test_planted_duplicates_are_excluded(shards, tmp_path):
    original = pair(3)
    same_picture = Document("same-picture", "test", ("quite another caption", original.segments[1]), {})
    near = picture("yellow", 3, size=33)  # other bytes, hardly another look
    near_duplicate = Document("near-duplicate", "test", (original.segments[0], near), {})
    train = shards("train", [*map(pair, range(N)), same_picture, near_duplicate])
    neighbours = build(tmp_path / "out", train)
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
    config = RetrievalConfig(num_candidates=N, max_score=1.0)
    neighbours = build(tmp_path / "out", shards("train", documents), config)
    assert neighbours.facts["left_out"]["same_cluster"] == 2 * N
    assert all(set(range(N)) - set(neighbours.candidates(i).tolist()) == {i, i ^ 1} for i in range(N))


def test_near_duplicates_are_excluded_among_neighbours_too(shards, tmp_path):
    def copy(number: int) -> Document:
        return Document(f"copy-{number}", "test", (f"a turtle swims in the sea {number}", picture("green", number)), {})

    train = shards("train", [*map(pair, range(N)), *map(copy, range(30))])
    neighbours = build(tmp_path / "out", train, RetrievalConfig(num_candidates=4, max_score=0.6, query_dropout=0.0))
    vectors = np.load(tmp_path / "out/memory/vectors.npy").astype(np.float32)
    for i in range(len(train)):
        chosen = neighbours.candidates(i)
        own = vectors[chosen] @ vectors[[i, *chosen]].T
        np.fill_diagonal(own[:, 1:], -1)
        assert own.max(initial=-1) <= 0.6 + 1e-5
    assert neighbours.facts["left_out"]["near_duplicate_of_another_neighbour"] > 0


def test_only_whole_documents_are_retrieved_when_asked_for(shards, tmp_path):
    texts = [Document(f"text-{i}", "test", (pair(i).segments[0],), {}) for i in range(N)]
    train = shards("train", [*map(pair, range(N)), *texts])
    both = build(tmp_path / "both", train, RetrievalConfig(num_candidates=4, modality="both"))
    plain = build(tmp_path / "any", train, RetrievalConfig(num_candidates=4))
    assert max(both.candidates(i).max() for i in range(2 * N)) < N
    assert max(plain.candidates(i).max() for i in range(2 * N)) >= N
    assert both.facts["left_out"]["modality"] > 0
    memory = Memory(tmp_path / "both/memory")
    assert max(memory.search("a photograph of a zebra", None, 4)) < N


def test_windows_of_a_long_document_are_retrieved_one_by_one(shards, tmp_path):
    segments = [segment for i in range(12) for segment in pair(i).segments]
    long = Document("long", "test", (*segments, "the end"), {})
    train = shards("train", [long, *(pair(i) for i in range(20, 40))])
    neighbours = build(tmp_path / "out", train, RetrievalConfig(num_candidates=2, query_dropout=0.0))
    found = [neighbours.place(number) for i in range(1, 21) for number in neighbours.candidates(i).tolist()]
    of_long = [place for place in found if place[0] == 0]
    assert of_long and {place[2] for place in of_long} == {12}
    window = window_document(train, 0, 11, 12)
    assert window.segments == (*pair(11).segments, "the end")
    assert all(neighbours.place(number)[0] != 0 for number in neighbours.candidates(0).tolist())


def test_validation_documents_find_training_documents(shards, tmp_path):
    train, held_out = shards("train", map(pair, range(N))), shards("held_out", [pair(i, "val") for i in range(50, 60)])
    found = build(tmp_path / "out", train, validation=held_out)
    assert len(found) == 10 and max(found.candidates(i).max() for i in range(10)) < N
    assert len(Neighbours(tmp_path / "out/train")) == N


def test_building_is_a_pure_function_of_seed_and_documents(shards, tmp_path):
    train = shards("train", map(pair, range(N)))
    for name, seed, size in (("a", 0, 4096), ("b", 0, 7), ("c", 1, 4096)):
        build(tmp_path / name, train, seed=seed, part_documents=size)
    a, b, c = (np.load(tmp_path / name / "train/numbers.npy") for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)  # another seed drops other words


def test_random_neighbours_are_random_and_filtered_alike(shards, tmp_path):
    documents = [replace(pair(i), meta={"cluster": i // 2}) for i in range(N)]
    config = RetrievalConfig(num_candidates=4, search="random")
    neighbours = build(tmp_path / "out", shards("train", documents), config)
    numbers = np.concatenate([neighbours.candidates(i) for i in range(N)])
    related = [(c - i) % 5 == 0 for i in range(N) for c in neighbours.candidates(i).tolist()]
    assert len(set(numbers.tolist())) > N * 0.9 and np.mean(related) < 0.35
    assert all(not {i, i ^ 1} & set(neighbours.candidates(i).tolist()) for i in range(N))


def test_what_was_done_before_a_crash_is_not_done_again(shards, tmp_path):
    train, out, calls = shards("train", map(pair, range(N))), tmp_path / "out", []

    def run(work, tasks, done, label):
        calls.append(label)
        if label.startswith("searching") and calls.count(label) == 1:
            raise KeyboardInterrupt
        return run_here(work, tasks, done, label)

    with pytest.raises(KeyboardInterrupt):
        build(out, train, run=run)
    before = (out / "memory/memory.json").stat().st_mtime_ns
    build(out, train, run=run)
    assert (out / "memory/memory.json").stat().st_mtime_ns == before
    build(tmp_path / "straight", train)
    for name in ("train/numbers.npy", "train/scores.npy", "memory/vectors.npy", "flops.json"):
        assert (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert not (out / ".work").exists()


@pytest.mark.parametrize("count", [1, 3])
def test_a_memory_smaller_than_the_wish_gives_what_it_has(shards, tmp_path, count):
    train, queries = shards("train", map(pair, range(count))), shards("queries", [pair(7, "query")])
    neighbours = build(tmp_path / "out", train, validation=queries)
    assert sorted(neighbours.candidates(0).tolist()) == list(range(count))
    assert len(neighbours.scores(0)) == count
    assert sorted(Memory(tmp_path / "out/memory").search("a zebra", None, 4)) == list(range(count))


def test_documents_whose_candidates_are_all_filtered_have_none_and_are_counted(shards, tmp_path):
    documents = [replace(pair(i), meta={"cluster": 1}) for i in range(6)]
    neighbours = build(tmp_path / "out", shards("train", documents))
    assert all(len(neighbours.candidates(i)) == 0 for i in range(6))
    assert neighbours.facts["without_neighbours"] == 6 and neighbours.facts["mean_score"] is None
    assert {hit.reason for hit in neighbours.hits(0, TEXT)} == {"self", "same_cluster"}


def test_memory_answers_texts_pictures_and_both(shards, tmp_path):
    build(tmp_path / "out", shards("train", map(pair, range(N))))
    memory = Memory(tmp_path / "out/memory")
    for number, animal in enumerate(ANIMALS):
        found = memory.search(f"the {animal}", None, 3)
        assert len(found) == 3 and all(i % 5 == number for i in found)
    for number, color in enumerate(COLORS):
        pixels = decode_square(picture(color, 999).data, 48)
        found = memory.search(None, pixels, 3)
        assert sum(i % 4 == number for i in found) >= 2
        both = memory.search("the zebra", pixels, 6)
        assert any(i % 4 == number for i in both) and any(i % 5 == 0 for i in both)
    assert memory.search("", None, 3) == []


def test_a_damaged_or_foreign_artifact_is_refused(shards, tmp_path):
    train, out = shards("train", map(pair, range(5))), tmp_path / "out"
    build(out, train)

    class Other:
        fingerprint, dimension = "other", 512

    with pytest.raises(UserError, match="not of 512 by other"):
        Memory(out / "memory", Other())
    numbers = np.load(out / "train/numbers.npy")
    np.save(out / "train/numbers.npy", numbers[:3])
    with pytest.raises(UserError, match="3 rows"):
        Neighbours(out / "train")
    np.save(out / "train/numbers.npy", numbers)
    facts = json.loads((out / "memory/memory.json").read_text())
    (out / "memory/memory.json").write_text(json.dumps(facts | {"format_version": 1}))
    with pytest.raises(UserError, match="format 1"):
        Memory(out / "memory")
    (out / "memory/memory.json").unlink()
    with pytest.raises(UserError, match="cannot read"):
        Neighbours(out / "train")


def test_an_empty_memory_is_refused(tmp_path):
    from mmtrain.retrieval.encoders import open_encoder
    from mmtrain.retrieval.memory import write_memory

    with pytest.raises(UserError, match="no document to retrieve"):
        write_memory([], None, open_encoder(CONFIG), CONFIG, tmp_path, 0)


def test_a_vector_that_is_not_finite_names_the_document(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("mmtrain.retrieval.encoders.encode_text", lambda text, d: np.full(d, np.nan, np.float32))
    with pytest.raises(UserError, match="text vector of document doc-0000 is not finite"):
        build(tmp_path / "out", shards("train", map(pair, range(3))))

"""Procedural scenes: pure, unambiguous, and readable back from their captions."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.config import CorpusConfig
from mmtrain.documents import Document, decode_square, read_corpus
from mmtrain.documents.captions import (
    NUM_PHRASINGS,
    NUM_PLACE_CHOICES,
    NUM_RELATION_PHRASES,
    NUM_SIZE_CHOICES,
    place,
)
from mmtrain.documents.scene import BACKGROUNDS, COLORS, INVERSE, SHAPES, Scene, Thing, relation_between
from mmtrain.documents.shapes import HELD_OUT, make_document, make_scene, parse_caption, questions, write_caption

splits = st.sampled_from(["train", "validation"])
indices = st.integers(0, 10**6)


def read(split: str, **options) -> list[Document]:
    documents = read_corpus(CorpusConfig(**options), Path())
    return [document for document in documents if document.meta["split"] == split]


def canonical(scene: Scene) -> set[tuple[int, str, int]]:
    """Relations with the lower index first."""
    return {(s, r, o) if s < o else (o, INVERSE[r], s) for s, r, o in scene.relations}


@given(st.integers(0, 9), splits, indices)
@settings(max_examples=40, deadline=None)
def test_document_is_a_pure_function_of_seed_split_and_index(seed, split, index):
    first = make_document(seed, split, index)
    assert first == make_document(seed, split, index)
    assert Scene.from_json(json.loads(json.dumps(first.meta))["scene"]) == make_scene(seed, split, index)


def test_seed_split_and_index_each_change_the_scene():
    scenes = [make_scene(*key) for key in [(0, "train", 0), (1, "train", 0), (0, "validation", 0), (0, "train", 1)]]
    assert len(set(scenes)) == 4


@given(
    splits,
    indices,
    st.integers(0, NUM_PHRASINGS - 1),
    st.integers(0, NUM_RELATION_PHRASES - 1),
    st.integers(0, NUM_SIZE_CHOICES - 1),
    st.integers(0, NUM_PLACE_CHOICES - 1),
)
@settings(max_examples=300, deadline=None)
def test_parse_caption_inverts_every_caption(split, index, phrasing, relation_phrase, size_choice, place_choice):
    scene = make_scene(0, split, index)
    parsed = parse_caption(write_caption(scene, phrasing, relation_phrase, size_choice, place_choice))
    sizes = [thing.size if size_choice == NUM_SIZE_CHOICES - 1 else None for thing in scene.objects]
    assert (parsed.background, parsed.count) == (scene.background, len(scene.objects))
    assert [(t.color, t.shape, t.size) for t in parsed.objects] == [
        (t.color, t.shape, size) for t, size in zip(scene.objects, sizes, strict=True)
    ]
    assert canonical(parsed) == canonical(scene)


@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_parse_caption_survives_any_text(text):
    parse_caption(text)


def test_gibberish_states_nothing():
    assert parse_caption("graycircle of it left of ### shape") == Scene(None)


@given(splits, indices)
@settings(max_examples=200, deadline=None)
def test_scene_is_unambiguous(split, index):
    scene = make_scene(0, split, index)
    assert scene.background in BACKGROUNDS and len({t.color for t in scene.objects}) == scene.count
    for first, second in itertools.combinations(scene.objects, 2):
        assert np.hypot(first.x - second.x, first.y - second.y) > 0.25  # two small radii
    for subject, relation, other in scene.relations:
        first, second = scene.objects[subject], scene.objects[other]
        assert relation_between(first, second) == relation
        along, across = sorted((abs(first.x - second.x), abs(first.y - second.y)), reverse=True)
        assert along > 1.99 * across  # plainly so, not on a diagonal
    asked = [question for question, _ in questions(scene)]
    assert len(asked) == len(set(asked))


def test_held_out_combinations_never_occur_in_train_and_do_in_validation():
    def pairs(split):
        return {(t.color, t.shape) for index in range(2000) for t in make_scene(0, split, index).objects}

    assert pairs("train") == set(itertools.product(COLORS, SHAPES)) - HELD_OUT
    assert pairs("validation") >= HELD_OUT
    documents = read("validation", num_documents=1, num_validation=60)
    for document in documents:
        things = Scene.from_json(document.meta["scene"]).objects
        assert document.meta["held_out"] == any((t.color, t.shape) in HELD_OUT for t in things)
    assert 0 < sum(document.meta["held_out"] for document in documents) < 60


def test_corpus_gives_the_configured_number_of_square_pictures():
    documents = read("train", num_documents=7, image_size=48)
    assert [document.id for document in documents] == [f"shapes-train-{index:06d}" for index in range(7)]
    assert documents == [make_document(0, "train", index, 48) for index in range(7)]
    for document in documents:
        assert re.fullmatch(r"[A-Za-z0-9_-]+", document.id)
        assert isinstance(document.segments[0], str)
        assert decode_square(document.images[0].data, 48).shape == (48, 48, 3)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (0.25, 0.25, "at the top left"),
        (0.5, 0.75, "at the bottom"),
        (0.625, 0.5, "at the right"),
        (0.5, 0.5, "in the center"),
    ],
)
def test_places_are_named_as_they_are_seen(x, y, words):
    thing = Thing("red", "star", "small", x, y)
    assert place(thing) == words
    assert write_caption(Scene("gray", (thing,), (), 1), 1, place_choice=1) == f"one shape on gray: a red star {words}"

"""Clusters: what belongs together is found, what does not stays apart, and the order of the corpus changes nothing."""

import hashlib
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.config import DedupeConfig
from mmtrain.documents import Document, Image, encode_png
from mmtrain.documents.clusters import LARGE_BUCKET, find_clusters, validation_side
from mmtrain.documents.corpus import Account
from mmtrain.documents.signatures import NUM_MINIMA, Signatures, sign

WORDS = [f"word{number}" for number in range(120)]
ARTICLE = " ".join(WORDS)


@cache
def picture(seed: int, quality: int = 0) -> Image:
    """A smooth picture of random colors; another quality is another file that looks the same."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 250, (6, 6, 3)).repeat(8, 0).repeat(8, 1) + quality
    data = encode_png(pixels.astype(np.uint8))
    return Image(data, 48, 48, hashlib.sha256(data).hexdigest(), "png")


def signatures(*documents: tuple[str | Image, ...]) -> Signatures:
    return Signatures.concatenate(
        [sign(Document(f"d-{number}", "test", segments, {})) for number, segments in enumerate(documents)]
    )


def groups(*documents: tuple[str | Image, ...], **options) -> list[int]:
    """Per document the number of the first document of its cluster."""
    cluster = find_clusters(signatures(*documents), DedupeConfig(**options)).cluster.tolist()
    return [cluster.index(value) for value in cluster]


def test_copies_are_found_and_the_first_stays():
    given_documents = signatures(("a", picture(1)), ("b",), ("a", picture(1)), ("b",), ("b", picture(1)))
    found = find_clusters(given_documents, DedupeConfig(pictures=False))
    assert found.duplicate.tolist() == found.dropped.tolist() == [False, False, True, True, False]
    account = Account()
    found.book(given_documents, account)
    assert account.skipped == {"exact copy of an earlier document": 2}
    assert account.examples == {"exact copy of an earlier document": "d-2"}
    kept = find_clusters(given_documents, DedupeConfig(exact=False))
    assert kept.duplicate.sum() == 2 and not kept.dropped.any()


def test_captions_of_one_picture_are_one_cluster_and_other_pictures_others():
    coco = [(f"caption {number}", picture(number // 5)) for number in range(10)]
    assert groups(*coco) == [0] * 5 + [5] * 5
    assert groups(*coco, pictures=False) == list(range(10))


def test_pictures_that_look_alike_are_the_same_up_to_the_distance():
    documents = [("a", picture(1)), ("b", picture(1, quality=2)), ("c", picture(2))]
    assert groups(*documents) == [0, 0, 2]
    assert groups(*documents, picture_distance=-1) == [0, 1, 2]


def test_colors_tell_pictures_apart_that_are_alike_in_gray():
    flags = []
    for color in ((200, 0, 0), (0, 102, 0)):  # the same brightness
        pixels = np.random.default_rng(1).integers(0, 2, (6, 6, 1)).repeat(8, 0).repeat(8, 1) * np.array(color)
        data = encode_png(pixels.astype(np.uint8))
        flags.append(Image(data, 48, 48, hashlib.sha256(data).hexdigest(), "png"))
    both = signatures((flags[0],), (flags[1],))
    assert both.picture_hash[0] == both.picture_hash[1] and both.picture_tells.all()
    assert groups((flags[0],), (flags[1],)) == [0, 1]


def test_blank_pictures_match_as_files_only():
    blank = [Image(data, 8, 8, hashlib.sha256(data).hexdigest(), "png")
             for data in (encode_png(np.full((8, 8, 3), level, np.uint8)) for level in (250, 251))]  # fmt: skip
    assert groups(("a", blank[0]), ("b", blank[1]), ("c", blank[0])) == [0, 1, 0]


def test_an_icon_on_every_page_links_nothing():
    icon = picture(10_000)
    pages = [(f"page {number}", icon, picture(number)) for number in range(2 * LARGE_BUCKET)]
    assert groups(*pages, ("only the icon", icon)) == list(range(len(pages) + 1))


def test_enough_common_pictures_link():
    def page(*numbers):
        return (f"page {numbers}", *(picture(number) for number in numbers))

    assert groups(page(1, 2, 3), page(1, 2), page(4, 5, 6), page(4, 7, 8)) == [0, 0, 2, 3]
    assert groups(page(1, 2, 3), page(1, 2), picture_overlap=0.7) == [0, 1]
    assert groups(page(1, 1, 1, 2), page(1, 3)) == [0, 1], "a picture counts once per document"
    assert groups(("a", *[picture(1)] * 3), ("b", picture(1))) == [0, 0]


def test_slightly_edited_texts_are_one_cluster():
    edited = ARTICLE.replace("word60 ", "other ")
    rewritten = ARTICLE.replace("0 ", "x ")  # every tenth word
    assert groups((ARTICLE,), (edited,), (rewritten,)) == [0, 0, 2]
    assert groups((ARTICLE,), (edited,), texts=False) == [0, 1]
    assert groups((ARTICLE,), (edited,), text_similarity=1.0) == [0, 1]
    assert groups((ARTICLE,), (rewritten,), text_similarity=0.3) == [0, 0]


def test_near_duplicates_can_be_dropped():
    given_documents = signatures(("b", picture(1)), ("a", picture(1)), ("a", picture(1)), ("c", picture(2)))
    found = find_clusters(given_documents, DedupeConfig(near="drop"))
    assert found.dropped.tolist() == [False, True, True, False]
    account = Account()
    found.book(given_documents, account)
    assert account.skipped == {"exact copy of an earlier document": 1, "near-duplicate of an earlier document": 1}


def test_pictures_in_too_many_documents_are_named_and_link_nothing():
    pages = [(f"page {number}", picture(1, quality=number % 2)) for number in range(4)]
    found = find_clusters(signatures(*pages, ("x", picture(2))), DedupeConfig(max_picture_uses=3))
    assert found.common_pictures == {picture(1).sha256, picture(1, quality=1).sha256}
    assert len(set(found.cluster.tolist())) == 5
    assert not find_clusters(signatures(*pages), DedupeConfig(max_picture_uses=4)).common_pictures


@cache
def random_corpus(num_documents: int = 150) -> Signatures:
    """Made-up signatures with many near pairs: few pictures, each with variants, and texts that are edits of few."""
    rng = np.random.default_rng(5)
    num_pictures = rng.integers(0, 4, num_documents).astype(np.int32)
    kinds = rng.integers(0, 40, num_pictures.sum())
    hashes, colors = rng.integers(0, 2**64, 40, dtype=np.uint64), rng.integers(0, 256, (40, 48))
    flips = [np.uint64(sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 5), replace=False))) for _ in kinds]
    variants = [hashlib.sha256(f"{kind} {flip}".encode()).digest() for kind, flip in zip(kinds, flips, strict=True)]
    minima = rng.integers(0, 2**32, (20, NUM_MINIMA), dtype=np.uint32)[rng.integers(0, 20, num_documents)]
    edited = rng.random((num_documents, NUM_MINIMA)) < rng.choice([0.0, 0.05, 0.15, 0.5], (num_documents, 1))
    minima[edited] = rng.integers(0, 2**32, edited.sum(), dtype=np.uint32)
    has_minima = rng.random(num_documents) < 0.5
    contents = [hashlib.sha256(str(number).encode()).digest() for number in range(num_documents)]
    return Signatures(
        ids=np.array([b"d-%d" % number for number in range(num_documents)]),
        content=np.array([list(content) for content in contents], dtype=np.uint8),
        num_pictures=num_pictures,
        has_minima=has_minima,
        text_minima=minima[has_minima],
        picture_digest=np.array([list(variant) for variant in variants], dtype=np.uint8),
        picture_hash=hashes[kinds] ^ np.array(flips),
        picture_tells=np.ones(len(kinds), dtype=bool),
        picture_colors=colors[kinds].astype(np.uint8),
    )


def every_pair(corpus: Signatures, config: DedupeConfig) -> list[list[int]]:
    """The clusters by the definition: all pairs compared, none left out; rows of members."""

    def parts(size, linked):
        label = list(range(size))
        for a in range(size):
            for b in range(a):
                if label[a] != label[b] and linked(a, b):
                    label = [label[b] if value == label[a] else value for value in label]
        return label

    hashes, digest = corpus.picture_hash, corpus.picture_digest
    kind = parts(len(hashes), lambda a, b: (digest[a] == digest[b]).all()
                 or int(hashes[a] ^ hashes[b]).bit_count() <= config.picture_distance)  # fmt: skip
    ends = np.cumsum(corpus.num_pictures)
    sets = [set(kind[end - num : end]) for end, num in zip(ends, corpus.num_pictures, strict=True)]
    row = np.cumsum(corpus.has_minima) - 1

    def linked(a, b):
        if (corpus.content[a] == corpus.content[b]).all():
            return True
        shared, together = len(sets[a] & sets[b]), len(sets[a] | sets[b])
        if config.pictures and shared and shared / together >= config.picture_overlap:
            return True
        both = config.texts and corpus.has_minima[a] and corpus.has_minima[b]
        return both and (corpus.text_minima[row[a]] == corpus.text_minima[row[b]]).mean() >= config.text_similarity

    label = parts(len(corpus), linked)
    return sorted([index for index, value in enumerate(label) if value == first] for first in set(label))


@pytest.mark.parametrize(
    "config",
    [DedupeConfig(texts=False), DedupeConfig(pictures=False), DedupeConfig(picture_overlap=0.3, text_similarity=0.7)],
)
def test_clusters_are_those_of_comparing_every_pair(config):
    corpus = random_corpus()
    cluster = find_clusters(corpus, config).cluster
    found = sorted(np.flatnonzero(cluster == value).tolist() for value in set(cluster.tolist()))
    assert found == every_pair(corpus, config)
    assert 10 < len(found) < 150


def reordered(corpus: Signatures, order: list[int]) -> Signatures:
    ends = np.cumsum(corpus.num_pictures)
    pictures = np.concatenate([np.arange(ends[i] - corpus.num_pictures[i], ends[i]) for i in order]).astype(int)
    rows = (np.cumsum(corpus.has_minima) - 1)[order][corpus.has_minima[order]]
    looks = (corpus.picture_digest, corpus.picture_hash, corpus.picture_tells, corpus.picture_colors)
    return Signatures(
        corpus.ids[order], corpus.content[order], corpus.num_pictures[order], corpus.has_minima[order],
        corpus.text_minima[rows], *(column[pictures] for column in looks),
    )  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(150)), fraction=st.floats(0.0, 0.9))
def test_order_changes_no_cluster_and_no_side(order, fraction):
    corpus = random_corpus()
    cluster = find_clusters(corpus, DedupeConfig()).cluster
    shuffled = find_clusters(reordered(corpus, order), DedupeConfig()).cluster
    assert (shuffled == cluster[order]).all()
    side = validation_side(cluster, fraction)
    assert (validation_side(shuffled, fraction) == side[order]).all()
    assert not set(cluster[side]) & set(cluster[~side])
    assert side.any() == (fraction > 0) and not side.all()


def test_a_cluster_is_named_by_its_smallest_content():
    corpus = signatures(("a", picture(1)), ("b", picture(1)), ("c",))
    smallest = min(int.from_bytes(content.tobytes()[:8], "big") for content in corpus.content[:2]) >> 1
    found = find_clusters(corpus, DedupeConfig()).cluster
    assert found[:2].tolist() == [smallest] * 2 and found.dtype == np.int64
    assert found[2] == find_clusters(signatures(("c",)), DedupeConfig()).cluster[0]


def test_large_clusters_are_held_out_as_often_as_small_ones():
    rng = np.random.default_rng(0)
    smallest_of_many = rng.integers(0, 2**63, (4000, 20)).min(axis=1)
    assert validation_side(smallest_of_many, 0.1).mean() == pytest.approx(0.1, abs=0.02)


def test_small_corpora_have_both_sides():
    assert validation_side(np.array([5, 7]), 0.001).sum() == validation_side(np.array([5, 7]), 0.9).sum() == 1
    assert not validation_side(np.array([5, 7]), 0.0).any()
    assert not validation_side(np.array([5, 5]), 0.9).any(), "alone it trains"
    assert len(validation_side(np.empty(0, dtype=np.int64), 0.1)) == 0


def test_a_crowd_is_given_up_and_counted(monkeypatch):
    monkeypatch.setattr("mmtrain.documents.clusters.MOST_LEADERS", 3)
    pages = [(f"page {number}", picture(number)) for number in range(9)]
    crowd = signatures(*pages)
    crowd.picture_hash[:] = 7  # one hash, nine colors
    assert find_clusters(crowd, DedupeConfig()).num_uncompared > 0
    assert find_clusters(signatures(*pages), DedupeConfig()).num_uncompared == 0


def test_no_documents():
    found = find_clusters(Signatures.concatenate([]), DedupeConfig(near="drop", max_picture_uses=1))
    assert len(found.cluster) == len(found.dropped) == 0

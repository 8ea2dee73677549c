"""Statistics against numbers counted by hand."""

import hashlib
import json

import numpy as np
import pytest

from mmtrain.documents import Document, Image
from mmtrain.shards import DocumentShards, TokenShards, write_documents, write_tokens
from mmtrain.tokens import TokenDocument, TokenSegment, Vocabulary
from mmtrain.track.statistics import code_usage, corpus_statistics, distribution, histogram, left_out

VOCABULARY = Vocabulary(text_size=300, image_codes=8, num_sentinels=4)


def picture(size, width, height):
    data = bytes(size)
    return Image(data, width, height, hashlib.sha256(data).hexdigest(), "png")


def tokens(id, text, codes):
    ids = [6] * text + ([VOCABULARY.brk] if text and codes else []) + [VOCABULARY.image_start + code for code in codes]
    segments = [TokenSegment("text", 0, text)] if text else []
    segments += [TokenSegment("image", len(ids) - len(codes), len(codes))] if codes else []
    return TokenDocument(id, np.array(ids, VOCABULARY.dtype), tuple(segments), {})


@pytest.fixture
def found(tmp_path):
    documents = [
        Document("a", "one", ("héllo", picture(10, 40, 30), picture(20, 8, 80)), {"cluster": "x"}),
        Document("b", "one", ("four", "more"), {"cluster": "x"}),
        Document("c", "two", (picture(5, 20, 20),), {"cluster": "y"}),
    ]
    held_out = [Document("d", "one", ("hi",), {"cluster": "y"})]
    write_documents(tmp_path / "documents/train", documents, shard_bytes=20)
    write_documents(tmp_path / "documents/validation", held_out)
    ids = [tokens("a", 3, [0, 0, 0, 0]), tokens("b", 9, []), tokens("c", 0, [1, 1, 1, 1])]
    write_tokens(tmp_path / "tokens/train", ids, VOCABULARY, "t", "i", shard_documents=2)
    write_tokens(tmp_path / "tokens/validation", [tokens("d", 2, [])], VOCABULARY, "t", "i")
    splits = ("train", "validation")
    facts = {"train": {"skipped": {"blank": 2}, "bad": {"torn": 1}, "examples": {"blank": "z.png"}}, "corpus": {}}
    done = []
    found = corpus_statistics(
        {split: DocumentShards(tmp_path / "documents" / split) for split in splits},
        {split: TokenShards(tmp_path / "tokens" / split) for split in splits},
        facts,
        10,
        done.append,
    )
    assert done == [1, 2, 3, 4]
    return json.loads(json.dumps(found))


def test_documents_texts_and_pictures_are_counted(found):
    train = found["splits"]["train"]
    assert (train["documents"], train["texts"], train["characters"], train["text_bytes"]) == (3, 3, 13, 14)
    assert train["kinds"] == {"mixed": 1, "text only": 1, "picture only": 1}
    assert (train["pictures"], train["picture_bytes"], train["picture_formats"]) == (3, 35, {"png": 3})
    assert train["longer_side"]["p50"] == 40 and train["shorter_side"]["max"] == 30
    assert train["pictures_per_document"] | {"max": 2, "mean": 1.0} == train["pictures_per_document"]
    assert train["sources"] == {"one": 2, "two": 1} and train["shards"] > 1


def test_tokens_are_counted_by_modality_and_against_the_sequence(found):
    train = found["splits"]["train"]["tokens"]
    assert (train["total"], train["text"], train["image"], train["special"]) == (21, 12, 8, 1)
    assert train["length"]["min"] == 4 and train["length"]["max"] == 9 and train["length"]["p50"] == 8
    # 10 ids hold a document of 8 between two <eos>; that of 9 needs two windows.
    assert (train["fit"], train["windows"]) == (2, 4)
    assert found["splits"]["train"]["fertility"] == {"per_character": 12 / 13, "per_byte": 12 / 14}


def test_code_usage_is_that_of_two_equally_frequent_codes(found):
    codes = found["splits"]["train"]["tokens"]["codes"]
    assert (codes["used"], codes["size"]) == (2, 8) and codes["perplexity"] == pytest.approx(2)
    assert found["splits"]["validation"]["tokens"]["codes"] is None


@pytest.mark.parametrize("at_once", [1, 7, 1 << 22])
def test_code_usage_does_not_depend_on_how_much_is_read_at_once(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr("mmtrain.track.statistics.TOKENS_AT_ONCE", at_once)
    ids = [tokens(f"d{code}", 1, [code] * 3) for code in range(7)]
    write_tokens(tmp_path, ids, VOCABULARY, "t", "i", shard_documents=3)
    assert code_usage(TokenShards(tmp_path)) == {"used": 7, "size": 8, "perplexity": pytest.approx(7)}


def test_clusters_are_counted_over_the_splits_and_leaks_are_seen(found):
    assert found["clusters"] == {"number": 2, "largest": 2, "shared": 4, "documents": 4, "on_both_sides": 1}


def test_what_was_left_out_is_named(found):
    blank = {"where": "train", "kind": "skipped", "reason": "blank", "count": 2, "example": "z.png"}
    torn = {"where": "train", "kind": "bad", "reason": "torn", "count": 1, "example": None}
    assert found["left_out"] == [blank, torn]
    assert left_out({"skipped": {"blank": 2}, "examples": {"blank": "z.png"}}) == [{**blank, "where": ""}]


def test_percentiles_are_those_of_numpy():
    values = np.random.default_rng(0).integers(0, 50, 1001)
    found = distribution(dict(zip(*np.unique(values, return_counts=True), strict=True)))
    assert found is not None and found["mean"] == pytest.approx(values.mean())
    assert all(found[f"p{p}"] == np.percentile(values, p, method="inverted_cdf") for p in (5, 50, 99))


@pytest.mark.parametrize("lengths", [[0], [1], [1, 2, 3, 1000], list(range(1, 300)), [2**20]])
def test_the_histogram_holds_every_document_once(lengths):
    bins = histogram(np.array(lengths))
    assert sum(count for _, _, count in bins) == len(lengths) and bins[0][2] and bins[-1][2]
    assert all(low < high for low, high, _ in bins)
    assert all(before[1] == after[0] for before, after in zip(bins, bins[1:], strict=False))
    assert all(sum(low <= length < high for length in lengths) == count for low, high, count in bins)

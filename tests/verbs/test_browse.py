"""`mmtrain data browse`: which documents are on the page, and where it is."""

import re

import pytest

from mmtrain.config import UserError
from mmtrain.documents import Document
from mmtrain.shards import DocumentShards, write_documents
from mmtrain.verbs import browse


def ids(path):
    return re.findall(r"<h2>(.*?)</h2>", path.read_text())


def test_the_page_has_the_named_documents_first_and_a_sample(shapes, tmp_path, monkeypatch, capsys):
    config, corpus = shapes
    monkeypatch.chdir(tmp_path)
    named = corpus.documents["validation"].id(5)
    assert browse.main(config, ["4", named, "train:7", "page.html"]) == 0
    shown = ids(tmp_path / "page.html")
    assert shown[:2] == [named, corpus.documents["train"].id(7)] and len(set(shown)) == 6
    output = capsys.readouterr().out
    assert "page.html" in output and re.search(r"size +[\d.]+ kB", output)
    source = (tmp_path / "page.html").read_text()
    assert "6 of 80 documents" in source and source.count('class="neighbours"') == 6
    found = corpus.neighbours["validation"]
    best = corpus.documents["train"].id(int(found.candidates(5)[0]))
    assert f"<b>{found.scores(5)[0]:.3f}</b> <code>{best}</code>" in source


def test_names_alone_are_not_mixed_with_a_sample_and_the_page_lies_by_the_corpus(shapes):
    config, corpus = shapes
    assert browse.main(config, ["train:1"]) == 0
    assert ids(corpus.folder / "browse.html") == [corpus.documents["train"].id(1)]


def test_a_sample_is_seeded_without_repetition_and_from_all_splits(shapes):
    documents = shapes[1].documents
    first, same, other = (browse.sample(documents, 30, seed) for seed in (0, 0, 1))
    assert first == same != other and len(set(first)) == 30 and {split for split, _ in first} == set(documents)
    everything = browse.sample(documents, 1000, 0, taken=[("train", 3)])
    assert len(set(everything)) == 79 and ("train", 3) not in everything


def test_clusters_are_counted_over_the_whole_corpus(tmp_path):
    clusters = {"train": ["a", "a", "b", 7, None], "validation": ["a", 7]}
    for split, names in clusters.items():
        metas = [{} if name is None else {"cluster": name} for name in names]
        write_documents(tmp_path / split, [Document(f"{split}-{i}", "t", ("x",), m) for i, m in enumerate(metas)])
    documents = {split: DocumentShards(tmp_path / split) for split in clusters}
    assert browse.cluster_sizes(documents, [("train", 0), ("train", 3), ("train", 4)]) == {"a": 3, "7": 2}
    assert browse.cluster_sizes(documents, [("train", 4)]) == {}


@pytest.mark.parametrize("words", [["3", "4"], ["a.html", "b.html"], ["100000"]])
def test_words_that_make_no_sense_are_a_sentence(shapes, words):
    with pytest.raises(UserError, match="takes one number"):
        browse.main(shapes[0], words)

"""`mmtrain data inspect`: the document that was asked for, whole and true to what is stored."""

import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mmtrain.config import TextTokenizerConfig, UserError
from mmtrain.documents import Document
from mmtrain.shards import DocumentShards, TokenShards, write_documents, write_tokens
from mmtrain.tokens import TextTokenizer, Vocabulary, document_to_tokens
from mmtrain.verbs import inspect

HOSTILE = "a \x1b[31mred\x1b]0;owned\x07 \u202edesrever [bold]rich[/bold]"


@pytest.fixture
def stored(tmp_path):
    """Documents and tokens of texts, the ids in two orders, and the text tokenizer."""
    documents = [
        Document("doc-hostile", "src\x1b[2J", (HOSTILE,), {"cluster": "c\x1b[1m", "note": HOSTILE}),
        Document("doc-long", "test", ("word " * 2000,), {}),
        Document("doc-untokenized", "test", ("no tokens",), {}),
    ]
    text = TextTokenizer.train(["word word word"], TextTokenizerConfig(vocab_size=260))
    vocabulary = Vocabulary(text.size, 16, 4)
    write_documents(tmp_path / "documents", documents)
    tokens = [document_to_tokens(document, text, [], vocabulary) for document in (documents[1], documents[0])]
    write_tokens(tmp_path / "tokens", tokens, vocabulary, text.fingerprint, "i")
    return DocumentShards(tmp_path / "documents"), TokenShards(tmp_path / "tokens"), text


def shown(stored, i, full=False):
    documents, tokens, text = stored
    out = io.StringIO()
    inspect.show("train", i, documents, tokens, text, Console(file=out, width=30_000, highlight=False), full)
    return out.getvalue()


def test_one_document_with_its_tokens_and_where_it_lies(shapes, capsys):
    config, corpus = shapes
    document, ids = corpus.documents["validation"][3], corpus.tokens["validation"].tokens(3)
    assert inspect.main(config, [document.id, "full"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    image = document.images[0]
    assert f"validation, document 3 of {len(corpus.documents['validation'])}" in output
    assert document.texts[0] in output and f"{image.width} x {image.height} png" in output and image.sha256 in output
    names = ["<break>" if id == corpus.tokens["validation"].vocabulary.brk else str(id) for id in ids.tolist()]
    assert f"ids {' '.join(names)} decoded {document.texts[0]} (as stored)" in output
    assert f"start 0, length {len(names) - 17}," in output and "length 16, ids" in output
    sizes = re.findall(r"tar -xOf \S+\.tar (\S+)\.json # ([\d,]+) bytes from byte ([\d,]+)", output)
    assert [key for key, _, _ in sizes] == [document.id] * 2


def test_the_bytes_at_its_place_are_a_tar_of_the_document(shapes):
    _, corpus = shapes
    for shards, parts in ((corpus.documents["train"], ["0.png"]), (corpus.tokens["train"], ["npy"])):
        for i in (0, 17, len(shards) - 1):
            path, offset, size = shards.place(i)
            with tarfile.open(fileobj=io.BytesIO(Path(path).read_bytes()[offset : offset + size]), mode="r:") as tar:
                assert tar.getnames() == [f"{shards.id(i)}.{name}" for name in ["json", *parts]]
            assert size % 512 == 0


def test_no_word_shows_the_first_documents(shapes, capsys):
    config, corpus = shapes
    assert inspect.main(config, []) == 0
    output = capsys.readouterr().out
    assert [id for id in corpus.documents["train"].ids.astype(str) if f"\n{id} " in output] == [
        corpus.documents["train"].id(i) for i in range(3)
    ]


def test_documents_are_found_by_id_by_index_and_in_a_split(shapes):
    documents = shapes[1].documents
    size = len(documents["train"])
    assert inspect.find(documents, documents["validation"].id(2)) == ("validation", 2)
    assert inspect.find(documents, "0") == ("train", 0) and inspect.find(documents, str(size)) == ("validation", 0)
    assert inspect.find(documents, "validation:1") == ("validation", 1)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("shapes-trian-000012", "did you mean shapes-train-0000"),
        ("80", "there is no document 80 of train and validation: give a number from 0 to 79"),
        ("validation:16", "there is no document 16 of validation: give a number from 0 to 15"),
        ("zebra\x1b[2J", r"no document zebra\?\[2J; give an id, an index"),
        ("-1", "no document -1; give an id"),
        ("²", "no document ²; give an id"),
    ],
)
def test_an_unknown_document_is_a_sentence(shapes, name, sentence):
    with pytest.raises(UserError, match=sentence):
        inspect.find(shapes[1].documents, name)


def test_a_terminal_obeys_nothing_that_a_corpus_says(stored):
    output = shown(stored, 0)
    assert not re.search("[\x1b\x07\u202e]", output)
    assert "desrever [bold]rich[/bold]" in output and "(as stored)" in output and "cluster   c\ufffd[1m" in output


def test_long_texts_and_ids_are_cut_and_say_so(stored):
    text = stored[0][1].texts[0]
    cut, full = shown(stored, 1), shown(stored, 1, full=True)
    assert text not in cut and "9,000 more characters; `full` shows all" in cut and "more)" in cut
    assert full.count(text) == 2 and "more" not in full


def test_tokens_are_found_by_id_and_their_absence_is_told(stored):
    documents, tokens, _ = stored
    assert f"{len(tokens.tokens(1)):,} in 1 segments" in shown(stored, 0)
    assert "does not hold this document" in shown(stored, 2)


def test_ids_have_the_names_of_specials(stored):
    vocabulary = stored[1].vocabulary
    ids = [0, vocabulary.brk, 7, vocabulary.sentinel_start + 1]
    assert [inspect.id_name(int(id), stored[1]) for id in np.array(ids)] == ["<pad>", "<break>", "7", "<sentinel:1>"]

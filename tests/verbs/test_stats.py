"""`mmtrain data stats`: a table for people, JSON for programs."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from mmtrain.config import UserError
from mmtrain.verbs import stats


def test_json_is_all_that_goes_to_standard_output(shapes, capsys):
    config, corpus = shapes
    assert stats.main(config, ["json"]) == 0
    found = json.loads(capsys.readouterr().out)
    train = found["splits"]["train"]
    assert found["corpus"] == "shapes" and train["documents"] == train["pictures"] == 64
    assert train["tokens"]["total"] == int(sum(n.sum() for n in corpus.tokens["train"].lengths()))
    assert train["tokens"]["sequence_length"] == config.stream.sequence_length
    assert found["clusters"] is None or found["clusters"]["documents"] == 80


def test_the_table_holds_the_numbers_of_both_splits(shapes, capsys):
    config, corpus = shapes
    assert stats.main(replace(config, stream=replace(config.stream, sequence_length=60)), []) == 0
    output = capsys.readouterr().out
    tokens = [int(sum(n.sum() for n in corpus.tokens[split].lengths())) for split in ("train", "validation")]
    assert f"{tokens[0]:,}" in output and f"{tokens[1]:,}" in output
    fit = [int(sum((n <= 58).sum() for n in corpus.tokens[split].lengths())) for split in ("train", "validation")]
    (line,) = [line for line in output.splitlines() if line.startswith("fit in a sequence of 60")]
    assert line.split()[6::2] == [str(fit[0]), str(fit[1])] and 0 < fit[0] < 64
    assert "tokens per document, validation" in output and "█" in output


def test_histogram_bars_are_in_proportion_and_never_vanish():
    lines = stats.histogram_lines([[1, 2, 4000], [2, 3, 2000], [3, 4, 1], [4, 5, 0]])
    assert [line.count("█") for line in lines] == [40, 20, 1, 0] and lines[0].endswith("4,000")


def test_remarks_name_what_was_left_out_and_warn_of_leaks():
    row = {"where": "train", "kind": "bad", "reason": "torn\x1b[2J", "count": 1200, "example": "a.png"}
    clusters = {"number": 5, "largest": 3, "shared": 4, "documents": 8, "on_both_sides": 1}
    lines = stats.remarks({"clusters": clusters, "left_out": [row]})
    assert lines[0].startswith("near-duplicates: 5 clusters, the largest of 3 documents; 4 (50.0%) documents")
    assert lines[1].startswith("WARNING: 1 clusters have documents in training and in validation")
    assert lines[2] == "damaged of train: 1,200 x torn\ufffd[2J (first: a.png)"
    assert stats.remarks({"clusters": None, "left_out": []}) == ["nothing was left out"]


def test_documents_without_tokens_have_a_table_too(shapes):
    from mmtrain.track.statistics import corpus_statistics

    found = corpus_statistics(shapes[1].documents, {}, {}, 64)
    out = io.StringIO()
    stats.show(found, "x", Console(file=out, width=100))
    assert "pictures" in out.getvalue() and "tokens" not in out.getvalue()


def test_another_word_is_a_sentence(shapes):
    with pytest.raises(UserError, match="takes the word json or none, not 'yaml'"):
        stats.main(shapes[0], ["yaml"])

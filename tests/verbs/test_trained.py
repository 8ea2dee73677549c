"""Verbs that need a trained run, where there is none, or a broken one."""

from pathlib import Path

import pytest

from mmtrain import cli


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("verb", ["generate", "evaluate", "report"])
def test_with_no_run_the_sentence_says_what_to_do(verb: str, capsys) -> None:
    assert cli.main([verb]) == 2
    error = capsys.readouterr().err
    assert "nothing was trained under runs yet; run `mmtrain train" in error and error.count("\n") == 1


@pytest.mark.parametrize("verb", ["generate", "evaluate", "report"])
def test_a_folder_that_is_no_run_is_refused(verb: str, empty_folder: Path, capsys) -> None:
    (empty_folder / "other").mkdir()
    assert cli.main([verb, "run=other"]) == 2
    assert "other is no run directory" in capsys.readouterr().err
    assert cli.main([verb, "name=other"]) == 2
    assert "runs/other is no run directory" in capsys.readouterr().err


def test_a_run_whose_data_is_gone_is_refused(empty_folder: Path, capsys) -> None:
    from mmtrain.config.compose import compose, freeze

    run = empty_folder / "runs" / "smoke"
    run.mkdir(parents=True)
    freeze(compose(["experiment=smoke"]), run / "config.yaml")
    assert cli.main(["generate", "run=runs/smoke"]) == 2
    assert "artifacts.json is missing" in capsys.readouterr().err
    places = {"documents": "d", "text_tokenizer": "t", "image_tokenizer": "i", "tokens": "k", "neighbours": None}
    (run / "artifacts.json").write_text(str(places).replace("'", '"').replace("None", "null"))
    assert cli.main(["generate", "run=runs/smoke"]) == 2
    assert "documents of run runs/smoke is missing" in capsys.readouterr().err


def test_tokenizer_needs_to_know_which_one(capsys) -> None:
    assert cli.main(["tokenizer"]) == 2
    assert "mmtrain tokenizer text" in capsys.readouterr().err

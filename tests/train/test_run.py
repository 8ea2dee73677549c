import json
from pathlib import Path

import pytest

from mmtrain.config import UserError
from mmtrain.train.run import Artifacts


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    folders = {}
    by_source = ("stamps/documents-1", "stamps/tokens-1", "web/documents-2", "web/tokens-2")
    for name in (*by_source, "mix/text-3", "mix/image-3"):
        folders[name] = tmp_path / "data" / name
        folders[name].mkdir(parents=True)
    for name, flops in (("stamps/tokens-1", 5), ("web/tokens-2", 7)):
        (folders[name] / "flops.json").write_text(json.dumps({"image_tokenizer_encode": flops}))
    documents = {"stamps": folders["stamps/documents-1"], "web": folders["web/documents-2"]}
    tokens = {"stamps": folders["stamps/tokens-1"], "web": folders["web/tokens-2"]}
    return Artifacts(documents, folders["mix/text-3"], folders["mix/image-3"], tokens, {})


def test_artifacts_of_several_sources_come_back_in_order(artifacts: Artifacts, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    artifacts.save(run)
    found = Artifacts.load(run)
    assert found == artifacts and list(found.tokens) == ["stamps", "web"] and found.main == "stamps"
    assert found.flops() == {"image_tokenizer_encode": 12}
    (tmp_path / "data/web/tokens-2").rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"tokens of run .* is missing"):
        Artifacts.load(run)


def test_what_was_left_out_is_told_by_source_and_reason(artifacts: Artifacts) -> None:
    for name, facts in (("stamps", {"skipped": {"blank picture": 2}, "bad": {"empty file": 1}}), ("web", {})):
        (artifacts.documents[name] / "facts.json").write_text(json.dumps(facts))
    assert artifacts.left_out() == {"data/stamps/left_out/blank_picture": 2, "data/stamps/left_out/empty_file": 1}


def test_artifacts_of_an_earlier_run_have_one_source(artifacts: Artifacts, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "old"
    run.mkdir(parents=True)
    places = {"documents": "../../data/stamps/documents-1", "text_tokenizer": "../../data/mix/text-3"}
    places |= {"image_tokenizer": "../../data/mix/image-3", "tokens": "../../data/stamps/tokens-1"}
    (run / "artifacts.json").write_text(json.dumps({**places, "neighbours": None}))
    found = Artifacts.load(run)
    assert found.documents == {"stamps": artifacts.documents["stamps"]} and found.main == "stamps"
    assert found.tokens == {"stamps": artifacts.tokens["stamps"]} and found.neighbours == {}

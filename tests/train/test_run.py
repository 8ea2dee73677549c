import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmtrain.config import Config, CorpusConfig, UserError
from mmtrain.config.compose import load_frozen
from mmtrain.train.run import Artifacts, check_run, open_run


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
    assert [books["image_tokenizer_encode"] for books in found.flops_by_folder().values()] == [5, 7]
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


def test_a_source_may_join_a_run_and_shares_may_change(artifacts: Artifacts, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    stamps = Config(name="one", mix={"stamps": 1}, corpora={"stamps": CorpusConfig(name="stamps", kind="stamps")})
    web = CorpusConfig(name="web", kind="html", path="web")
    both = replace(stamps, mix={"stamps": {"0": 1, "9": 2}, "web": 3}, corpora=stamps.corpora | {"web": web})
    alone = replace(artifacts, documents={}, tokens={"stamps": artifacts.tokens["stamps"]})
    open_run(run, stamps, alone, "first")
    check_run(run, both)
    open_run(run, both, artifacts, "second")
    assert load_frozen(run / "config.yaml").mix == both.mix and list(Artifacts.load(run).tokens) == ["stamps", "web"]
    with pytest.raises(UserError, match="bring the old data back"):
        open_run(run, both, alone, "third")
    with pytest.raises(UserError, match="seed=0, this command says 1"):
        check_run(run, replace(both, seed=1))


def test_a_secret_in_the_configuration_is_not_kept(artifacts: Artifacts, tmp_path: Path) -> None:
    run, secret = tmp_path / "runs" / "one", "hf_" + "a1B2" * 8
    config = Config(name="one", notes=f"with {secret}")
    config.track.tags = [f"token={secret}"]
    open_run(run, config, artifacts, f"mmtrain train notes={secret}")
    assert not [path for path in run.iterdir() if path.is_file() and secret in path.read_text()]
    config.corpus.tokens = "https://me:" + "opensesame" + "@example.org/tokens"
    with pytest.raises(UserError, match=r"corpus.tokens holds what looks like a secret"):
        open_run(run, config, artifacts, "again")

"""A search space is read as the command line reads its values; what cannot work is one sentence, before any trial."""

from pathlib import Path

import pytest

from mmtrain.config import UserError
from mmtrain.config.compose import compose
from mmtrain.config.listing import groups
from mmtrain.config.search import Range, as_experiment, plan_search, read_space, with_name


def test_a_space_has_values_and_ranges() -> None:
    space = {"optim.lr": {"low": 1e-4, "high": 0.1, "log": True}, "model.layers": {"low": 2, "high": 6, "step": 2}}
    space |= {"model": ["tiny", "small"], "optim.clip": {"low": 0.5, "high": 1, "step": 0.25}, "optim.beta2": [0.95]}
    read = read_space(space, groups())
    assert read["optim.lr"] == Range(1e-4, 0.1, True, None, False) and read["model"] == ("tiny", "small")
    assert isinstance(read["model.layers"], Range) and read["model.layers"].points() == ("2", "4", "6")
    assert isinstance(read["optim.clip"], Range) and read["optim.clip"].points() == ("0.5", "0.75", "1.0")


@pytest.mark.parametrize(
    ("key", "asked", "sentence"),
    [
        ("optim.lrr", [1], "optim.lrr is not a key of the configuration; did you mean optim.lr"),
        ("modle", ["tiny"], "modle is not a key of the configuration; did you mean model"),
        ("model", ["tinny"], "model=tinny does not exist; did you mean tiny"),
        ("model.layers", [2, "many"], "model.layers=many must be a whole number"),
        ("model.layers", {"low": 2, "high": 6.5}, "high=6.5 must be a whole number"),
        ("optim.lr", {"low": 0.1, "high": 0.01}, "low=0.1 must be smaller than high=0.01"),
        ("optim.lr", {"low": 0, "high": 1, "log": True}, "a logarithmic range begins above 0"),
        ("optim.lr", {"low": 0.1, "hi": 1}, "hi is none of its keys"),
        ("optim.kind", {"low": 0, "high": 1}, "a range is for settings that are numbers"),
        ("optim.lr", 0.1, "0.1 is neither a list of values nor a range"),
        ("name", ["a", "b"], "name belongs to the whole search"),
        ("seed", [1, 1], "a value is there twice: 1, 1"),
    ],
)
def test_what_is_no_space_is_one_sentence(key: str, asked: object, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        read_space({key: asked}, groups())
    assert sentence in str(caught.value) and str(caught.value).startswith("sweep.space: ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sweep.space={optim.clip:{low:-1.0,high:1.0}}"], "with optim.clip=-1.0: optim.clip=-1.0 is too small"),
        (["sweep.space={stream.sequence_length:[128,16]}"], "with stream.sequence_length=16: "),
        (["sweep.space={optim.lr:{low:0.1,high:1.0}}", "sweep.sampler=grid"], "the range of optim.lr has none"),
        (["sweep.space={seed:[1,2]}", "train.evaluate_every=0"], "no validation loss before the end"),
        (["sweep.space={seed:[1,2]}", "seed=3"], "there is no search space"),
        (["sweep.space={seed:[1,2]}", "optim.lr=1,2"], "gives several values"),
    ],
)
def test_what_could_not_be_trained_is_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_search(["experiment=smoke", *words])
    assert sentence in str(caught.value)


def test_a_sweep_has_its_own_name_and_no_second_one() -> None:
    assert with_name(["seed=1"], "ladder") == ["sweep=ladder", "seed=1", "name=ladder"]
    assert with_name(["sweep=lr_search", "name=mine"], "ladder") == ["sweep=lr_search", "name=mine"]
    with pytest.raises(UserError, match="experiment=iso_flop has a sweep of its own"):
        with_name(["experiment=iso_flop"], "ladder")


def test_the_best_trial_is_an_experiment_that_composes_to_the_same(tmp_path: Path) -> None:
    search, _ = plan_search(
        ["experiment=shapes_tiny", "sweep.space={optim.lr:[0.01,0.02]}", "model=cm3leon_tiny", "seed=3"]
    )
    job = search.job(4, {"optim.lr": "0.02"})
    text = as_experiment(search, job, "the best of 5")
    assert text.startswith("# @package _global_\n# the best of 5\n") and len(text.splitlines()) < 15
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "best.yaml").write_text(text)
    found = compose(["experiment=best", f"name={job.name}", f"root={search.folder}"], tmp_path)
    assert found.optim.lr == 0.02 and found == job.config

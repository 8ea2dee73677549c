"""The words of `mmtrain train -m` become jobs as Hydra's users expect; what cannot work is one sentence."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.config import UserError
from mmtrain.config.listing import groups
from mmtrain.config.override import read_override
from mmtrain.config.sweep import expand, written

FILE = """# @package _global_
name: mine
train:
  steps: 7
optim:
  warmup_steps: 3
sweep:
  grid: {optim.lr: [1e-3, 3e-3], seed: [1, 2]}
  cases:
    none: [retrieval=none]
    nearest: [retrieval=cm3leon, train.steps=9]
"""


def chosen(*words: str) -> dict[str, tuple[str, ...]]:
    return {job.name: job.choices for job in expand(list(words)).jobs}


def sentence(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        expand(list(words))
    return str(caught.value)


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(FILE)
    monkeypatch.setenv("MMTRAIN_CONFIG_DIR", str(tmp_path))
    return "experiment=mine"


def test_axes_are_crossed_and_name_the_runs() -> None:
    sweep = expand(["model=tiny,small", "optim.lr=1e-3,3e-3", "name=lr_grid", "root=here"])
    assert [job.name for job in sweep.jobs] == [
        f"model={m},lr={lr}" for m in ("tiny", "small") for lr in (0.001, 0.003)
    ]
    last = sweep.jobs[-1]
    assert (last.config.optim.lr, last.config.root, last.config.name) == (0.003, "here/lr_grid", "model=small,lr=0.003")
    group = "track.group=lr_grid"  # its runs are one group on W&B
    assert last.overrides == (group, "model=small", "optim.lr=0.003", f"name={last.name}", "root=here/lr_grid")
    assert expand(["seed=1,2", "name=x", "track.group=mine"]).jobs[0].config.track.group == "mine"


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("seed=range(1,6,2)", ["seed=1", "seed=3", "seed=5"]),
        ("+seed=choice(4,5)", ["seed=4", "seed=5"]),
        ("model=glob(llama_?b)", ["model=llama_1b", "model=llama_7b"]),
        ("notes='a,b',c d,x", ["notes='a,b'", "notes='c d'", "notes=x"]),
        ("image_tokenizer.levels=[8,5],[4,4]", ["image_tokenizer.levels=[8,5]", "image_tokenizer.levels=[4,4]"]),
        ("corpus.path=null,/a/b", ["corpus.path=null", "corpus.path='/a/b'"]),
    ],
)
def test_an_axis_is_written_as_in_hydra(word: str, values: list[str]) -> None:
    assert [choices for (choices,) in chosen(word).values()] == values


def test_cases_of_a_file_are_crossed_with_its_axes_and_the_command_line_wins(experiment: str) -> None:
    jobs = {job.name: job for job in expand([experiment, "seed=5"]).jobs}
    assert list(jobs) == ["none,lr=0.001", "none,lr=0.003", "nearest,lr=0.001", "nearest,lr=0.003"]
    assert [job.config.train.steps for job in jobs.values()] == [7, 7, 9, 9]
    assert {job.config.seed for job in jobs.values()} == {5}
    assert not jobs["none,lr=0.001"].config.retrieval.enabled
    jobs = {job.name: job for job in expand([experiment, "optim.lr=1", "seed=3,4", "train.steps=4", "name=x"]).jobs}
    assert list(jobs) == ["none,seed=3", "none,seed=4", "nearest,seed=3", "nearest,seed=4"]
    assert {job.config.train.steps for job in jobs.values()} == {4}


def test_names_fit_a_file_and_differ() -> None:
    names = [*chosen("notes='a b','a,b','" + "x" * 300 + "'", "seed=1")]
    assert len(set(names)) == 3 and all(len(name) < 130 and not set(name) & set("/ '\"") for name in names)
    assert names[0].startswith("notes=a-b-")
    assert [*chosen("train.flops=450000000000.0,0.5,5e10", "seed=1")] == ["flops=4.5e+11", "flops=0.5", "flops=5e+10"]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["optim.lrr=1,2"], "did you mean optim.lr?"),
        (["model=tiny,smal"], "model=smal does not exist; did you mean small"),
        (["seed=1,2", "optim.lr=1e-3,fast"], "optim.lr=fast must be a number"),
        (["model.heads=4,7"], "job heads=7: model.width=256 is not a multiple of model.heads=7"),
        (["name=a,b"], "name cannot be an axis"),
        (["sweep.parallel=1,2"], "sweep.parallel cannot be an axis"),
        (["seed=1,2,1"], "seed=1 is in the sweep twice"),
        (["optim.lr=interval(0,1)"], "is an interval"),
        (["model=glob(zz*)"], "matches nothing"),
        (["seed=1"], "this sweep has one run"),
        (["experiment=smoke,quickstart"], "add name=NAME"),
        (["sweep.grid={sed:[1,2]}"], "sed is not a key of the configuration; did you mean seed?"),
        (["sweep.grid={seed:[]}"], "sweep.grid.seed is empty"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(words: list[str], answer: str) -> None:
    assert answer in sentence(*words)


def test_a_case_may_not_set_an_axis(experiment: str) -> None:
    assert "retrieval is set by case none and is an axis" in sentence(experiment, "retrieval=none,cm3leon")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, max_size=4))
def test_a_written_value_is_read_as_it_was(values: list) -> None:
    said = read_override(f"sweep.grid={{seed:{written(values)}}}", groups())
    assert said.value == {"seed": values}

"""Overrides in, one validated configuration out; mistakes end in one sentence that helps."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.config import Config, UserError
from mmtrain.config.compose import compose, freeze, load_frozen, with_overrides
from mmtrain.config.listing import groups, summary


def sentence(*overrides: str, config_dir: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        compose(list(overrides), config_dir)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("model.layrs=3", "did you mean model.layers?"),
        ("modle.layers=3", "did you mean model.layers?"),
        ("layers=3", "did you mean model.layers?"),
        ("lr=1e-3", "did you mean image_tokenizer.lr or optim.lr?"),
        ("optim.learning_rate=1e-3", "optim has kind, lr"),
        ("model=tinny", "did you mean tiny or dit_tiny?"),
        ("experiment=quickstrt", "did you mean quickstart?"),
        ("stream=long", "set one of its keys, such as stream.sequence_length"),
        ("train", "is not KEY=VALUE"),
        ("hydra.run.dir=x", "Hydra itself cannot be changed"),
        ("~model", "keys cannot be removed"),
        ("model={layers: 3}", "takes the name of an option"),
    ],
)
def test_a_typo_is_answered_with_what_was_meant(override: str, answer: str) -> None:
    assert answer in sentence(override)


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("model.layers=abc", "model.layers=abc must be a whole number"),
        ("model.layers=1.5", "must be a whole number"),
        ("model.layers=1,2", "gives several values"),
        ("model.tie_embeddings=perhaps", "must be true or false"),
        ("generate.prompts=circle", "must be a list such as [one,two]"),
        ("image_tokenizer.levels=[8,x]", "must be a list such as [8,5,5,5]"),
        ("generate.prompts=[it's]", "in quotes of its own"),
    ],
)
def test_a_wrong_type_names_the_key_and_what_it_takes(override: str, answer: str) -> None:
    assert answer in sentence(override)


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (["model.layers=0"], "at least 1"),
        (["optim.lr=nan"], "at least 0"),
        (["generate.top_p=1.5"], "at most 1"),
        (["engine.stage=4"], "not one of auto, 0, 1, 2, 3"),
        (["model.heads=3"], "not a multiple of model.heads=3"),
        (["corpus.image_size=60"], "56 would be"),
        (["stream.sequence_length=64"], "at least 72 is needed"),
        (["image_tokenizer=lfq", "image_tokenizer.codebook_size=1000"], "512 would be"),
        (["image_tokenizer.levels=[]"], "image_tokenizer.levels=[]"),
        (["retrieval.num_documents=9"], "retrieval.num_candidates=4"),
        (["optim.warmup_steps=2000"], "longer than train.steps=1000"),
        (["corpus=pairs"], "corpus.path is empty"),
        (["corpus=img2dataset"], "corpus=img2dataset needs it"),
        (["name=../elsewhere"], "cannot name a folder"),
        (["corpus.name="], "cannot name a folder"),
        (["model.max_positions=100"], "shorter than stream.sequence_length"),
        (["objective.min_masks=17"], "objective.num_sentinels=16"),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_what_would(overrides: list[str], answer: str) -> None:
    assert answer in sentence(*overrides)


def test_the_command_line_wins_over_the_experiment_which_wins_over_the_group() -> None:
    assert compose(["model=small"]).model.width == 512
    assert compose(["experiment=smoke"]).model.width == 32
    assert compose(["model.width=64", "experiment=smoke"]).model.width == 64
    assert compose(["train.steps=5", "train.steps=7", "optim.warmup_steps=1"]).train.steps == 7


def test_text_is_taken_as_it_was_typed() -> None:
    config = compose(
        ["name=2024_10_31", "notes=it's a (first), try = \\", "+corpus.path=/a b/c,d", "track.entity=null"]
    )
    assert config.name == "2024_10_31"
    assert config.notes == "it's a (first), try = \\"
    assert config.corpus.path == "/a b/c,d"
    assert config.track.entity is None


def test_prompts_may_hold_spaces_and_quoted_commas() -> None:
    config = compose(["generate.prompts=[a red circle,'red, then blue']"])
    assert config.generate.prompts == ["a red circle", "red, then blue"]


def test_every_option_composes_and_says_what_it_is_for() -> None:
    for group, options in groups().items():
        for option, path in options.items():
            others = ["retrieval=none"] if option.startswith("dit_") else []
            composed = compose([f"{group}={option}", "corpus.path=somewhere", *others])
            assert isinstance(composed, Config)
            assert len(summary(path)) > 10, path
            if group == "experiment":
                assert composed.name == option


def test_secrets_cannot_be_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "geheim")
    monkeypatch.setenv("WHO", "me")
    assert "geheim" not in sentence("notes=${oc.env:MY_API_KEY}")
    assert "geheim" not in sentence("notes=${oc.env:${oc.env:PART,MY_API_KEY}}")
    assert compose(["notes=${oc.env:WHO}"]).notes == "me"


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_folder_of_your_own_adds_experiments_and_options(tmp_path: Path) -> None:
    mine = tmp_path / "my conf's"
    write(
        mine,
        "experiment/mine.yaml",
        "# @package _global_\n# my run\ndefaults:\n  - override /model: wide\nname: mine\n",
    )
    write(mine, "model/wide.yaml", "# wide\nwidth: 512\nheads: 8\n")
    config = compose(["experiment=mine"], mine)
    assert (config.name, config.model.width) == ("mine", 512)
    assert summary(groups(mine)["experiment"]["mine"]) == "my run"
    assert "did you mean" not in sentence("experiment=mine")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("# @package _global_\nmodel:\n  layrs: 3\n", "model.layrs (in experiment=bad) is not a key"),
        ("# @package _global_\nmodel:\n  layers: abc\n", "must be a whole number"),
        ("# @package _global_\nmodel:\n  _target_: os.system\n", "model._target_ (in experiment=bad) is not a key"),
        ("# @package _global_\ndefaults:\n  - override /model: tinny\n", "did you mean tiny or dit_tiny?"),
        ("# @package _global_\ndefaults:\n  - override /modle: tiny\n", "modle"),
        ("# @package _global_\nmodel: [1\n", "line 2"),
        ("# @package _global_\nname: ${nowhere}\n", "nowhere"),
        ("model:\n  layers: 3\n", "begins with '# @package _global_'"),
    ],
)
def test_a_mistake_in_a_file_names_the_file_and_the_key(tmp_path: Path, text: str, answer: str) -> None:
    write(tmp_path, "experiment/bad.yaml", text)
    assert answer in sentence("experiment=bad", config_dir=tmp_path)
    assert "\n" not in sentence("experiment=bad", config_dir=tmp_path)


TEXT = st.text(max_size=20).filter(lambda text: text != "???")  # OmegaConf's word for "still to be given"


@settings(max_examples=15, deadline=None)
@given(notes=TEXT, prompts=st.lists(TEXT, max_size=3), lr=st.floats(0, 1))
def test_what_is_frozen_comes_back_equal(tmp_path_factory: pytest.TempPathFactory, notes, prompts, lr) -> None:
    path = tmp_path_factory.mktemp("run") / "config.yaml"
    config = compose([])
    config = replace(
        config,
        notes=notes,
        generate=replace(config.generate, prompts=prompts),
        optim=replace(config.optim, lr=lr),
    )
    freeze(config, path)
    assert load_frozen(path) == config


@pytest.mark.parametrize(
    "text", ["${oc.env:HOME}", "\\${x}", "${", "1e3", "null", "a: b", "'", "2024-01-01", "\\\\${a}", "\x85"]
)
def test_text_that_looks_like_something_else_stays_text(tmp_path: Path, text: str) -> None:
    config = replace(compose([]), notes=text)
    freeze(config, tmp_path / "config.yaml")
    assert load_frozen(tmp_path / "config.yaml").notes == text
    assert with_overrides(config, ["generate.seed=3"]).notes == text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("model: {layrs: 3}", "did you mean model.layers?"),
        ("model: {layers: 0}", "at least 1"),
        ("model: [", "cannot be composed"),
        ("just text", "is not a configuration"),
    ],
)
def test_a_damaged_frozen_file_is_one_sentence(tmp_path: Path, text: str, answer: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="config.yaml|model.layers") as caught:
        load_frozen(tmp_path / "config.yaml")
    assert answer in str(caught.value)


def test_a_missing_frozen_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_frozen(tmp_path / "config.yaml")


def test_overrides_go_on_top_of_a_frozen_configuration() -> None:
    frozen = compose(["experiment=smoke", "model.layers=3"])
    changed = with_overrides(frozen, ["task=shapes", "generate.prompts=[a,b]", "task.num_prompts=9"])
    assert (changed.model.layers, changed.task.name, changed.task.num_prompts) == (3, "shapes", 9)
    assert changed.generate.prompts == ["a", "b"]
    assert frozen.generate.prompts == []
    with pytest.raises(UserError, match="starts a new run"):
        with_overrides(frozen, ["experiment=smoke"])
    with pytest.raises(UserError, match="did you mean generate.seed"):
        with_overrides(frozen, ["generate.sed=3"])


def test_the_grid_of_the_pictures_is_found() -> None:
    model = compose(["model.picture_grid=-1", "corpus.image_size=128", "stream.sequence_length=512"]).model
    assert model.picture_grid == 16
    assert "set it to -1" in sentence("model.picture_grid=7")


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (["engine=zero0", "engine.dtype=bf16"], "use engine.stage=1, engine=ddp, or engine.dtype=fp32"),
        (["optim.kind=muon"], "use engine=ddp, or optim.kind=adamw"),
        (["engine.stage=true"], "engine.stage=True is not one of auto, 0, 1, 2, 3"),
        (["engine.stage=1.0"], "write a whole number"),
        (["engine=zero0", "engine.dtype=fp32", "engine.offload_optimizer=true"], "use engine.stage=1"),
        (["engine=zero2", "engine.offload_parameters=true"], "use engine.stage=3"),
        (["engine=ddp", "engine.offload_optimizer=true"], "use engine=zero3"),
        (["engine=ddp", "engine.reduce_dtype=bf16"], "or engine=zero1"),
        (["engine.dtype=fp32", "engine.reduce_dtype=bf16"], "would round the gradients of engine.dtype=fp32"),
        (["model.family=chameleon", "model.width=96", "model.heads=32"], "width / heads must be even: it is 3"),
    ],
)
def test_engines_that_cannot_work_are_refused_before_anything_is_built(overrides: list[str], answer: str) -> None:
    assert answer in sentence(*overrides)

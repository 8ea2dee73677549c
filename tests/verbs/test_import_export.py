"""From foreign weights through training to a Hugging Face folder, by the command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from mmtrain import cli
from mmtrain.config import UserError
from mmtrain.config.compose import compose
from mmtrain.tokens import TextTokenizer
from tests.e2e.conftest import mmtrain
from tests.models.foreign import foreign_source

transformers = pytest.importorskip("transformers")

TRAIN = ("train", "experiment=smoke", "model.weights=weights", "objective=causal", "optim.lr=0.01", "engine=ddp",
         "engine.ranks=1", "engine.dtype=fp32", "optim.decay=constant", "track.wandb=disabled")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with source (a Llama of transformers) and weights (imported from it)."""
    folder = tmp_path_factory.mktemp("llama")
    foreign_source("llama-gqa", folder / "source")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["import", "source", "out=weights", "shard_bytes=30000"]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The same folder with a run of 6 steps from the weights, done again from step 3 on, and its export."""
    for words in (TRAIN, TRAIN, ("export", "run=runs/smoke", "out=exported", "shard_bytes=30000")):
        if words == TRAIN:
            shutil.rmtree(folder / "runs/smoke/checkpoints/step-00000006", ignore_errors=True)
        done = mmtrain(*words, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / f"{words[0]}.log").write_text(done.stdout)
    return folder


@pytest.mark.slow
def test_a_run_starts_from_imported_weights_goes_on_and_learns(trained: Path) -> None:
    folder = trained
    config = yaml.safe_load((folder / "runs/smoke/config.yaml").read_text())
    model = config["model"]
    assert (model["family"], model["kv_heads"], model["ffn_width"], model["weights"]) == ("llama", 2, 48, "weights")
    assert not model["tie_embeddings"] and model["norm_eps"] == 1e-6 and model["max_positions"] == 232
    assert config["text_tokenizer"]["path"] == "weights/tokenizer.json"
    rows = [json.loads(line) for line in (folder / "runs/smoke/metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert sorted(losses) == list(range(1, 7)) and losses[6] < losses[1] - 0.5
    facts = json.loads((folder / "weights/import.json").read_text())
    state = json.loads((folder / "runs/smoke/checkpoints/step-00000006/state.json").read_text())
    assert state["weights"] == facts["fingerprint"] and "resuming at step 3" in (folder / "train.log").read_text()


@pytest.mark.slow
def test_the_export_of_the_run_opens_and_draws(trained: Path) -> None:
    from mmtrain.tokens import ImageTokenizer, Vocabulary
    from mmtrain.train.checkpoint import latest_checkpoint, load_parameters

    out = trained / "exported"
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    found, _ = latest_checkpoint(trained / "runs/smoke/checkpoints")
    assert found is not None
    assert torch.equal(model.get_output_embeddings().weight, load_parameters(found)["head.weight"])
    vocabulary = Vocabulary.load(out / "vocabulary.json")
    text = TextTokenizer.load(trained / "weights/tokenizer.json")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    caption = "a red circle 🙂 on the left"
    assert tokenizer(caption)["input_ids"] == [vocabulary.text_start + id for id in text.encode(caption)]
    assert tokenizer.decode(tokenizer(caption)["input_ids"]) == caption
    start = tokenizer(f"<eos>{caption}<break>", return_tensors="pt")
    image = ImageTokenizer.load(out / "image_tokenizer")
    drawn = model.generate(**start, max_new_tokens=image.tokens_per_image, do_sample=False)
    assert drawn.shape[1] <= 232 and image.num_codes == vocabulary.image_codes
    card = (out / "README.md").read_text()
    assert "step 6 of the run smoke" in card and "AutoModelForCausalLM" in card and "{" not in card


@pytest.mark.slow
def test_another_export_in_the_same_place_is_refused(trained: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(trained)
    assert cli.main(["export", "run=runs/smoke", "out=exported", "shard_bytes=30000"]) == 0  # the same: it is there
    for words in (["out=exported", "dtype=bf16"], ["out=source"]):
        refused(["export", "run=runs/smoke", *words], f"{words[0]} exists and is something else", capsys)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("export run=runs/smoke", "out=FOLDER is missing; see `mmtrain export --help`"),
        ("export out=new", "nothing was trained under runs yet"),
        ("export out=new dtype=fp8", "dtype=fp8 is not one of float32, bf16"),
        ("export out=new shard_bytes=0", "shard_bytes=0 must be a whole number"),
        ("import source out=weights", "out=weights exists already"),
        ("import nowhere out=new", "nowhere is no folder"),
        ("import weights out=new", "weights is no folder that transformers saved (config.json is missing)"),
        ("import out=new", "reads one Hugging Face folder"),
    ],
)
def test_words_that_name_nothing_are_refused(words: str, sentence: str, folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    if "nothing was trained" in sentence:
        monkeypatch.chdir(folder / "source")
    refused(words.split(), sentence, capsys)


def refused(words: list[str], sentence: str, capsys) -> None:
    capsys.readouterr()
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model.layers=3"], "model.layers=3 contradicts model.weights=weights, which has 2; leave it out"),
        (["model=cm3leon_350m"], "model.family=cm3leon contradicts"),
        (["model.kv_heads=4"], "model.kv_heads=4 contradicts model.weights=weights, which has 2"),
        (["text_tokenizer.path=source/tokenizer.json"], "text_tokenizer.path=source/tokenizer.json contradicts"),
        (["model.weights=source"], "it is a Hugging Face folder: first `mmtrain import source out=FOLDER`"),
        (["model.weights=nowhere"], "model.weights=nowhere has no import.json; give a folder that `mmtrain import`"),
        (["stream.sequence_length=512"], "shorten it, or set model.max_positions=512 to go beyond them"),
    ],
)
def test_settings_that_contradict_the_weights_are_refused(words: list[str], sentence: str, folder: Path, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="^[^\n]*$") as error:
        compose(["experiment=smoke", "model.weights=weights", *words])
    assert sentence in str(error.value)
    same = compose(["model.weights=weights", "model.layers=2", "model.kv_heads=2", "model.max_positions=512"])
    assert (same.model.layers, same.model.max_positions) == (2, 512)


def test_a_file_that_names_weights_and_another_architecture_is_refused(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "conf" / "model"
    mine.mkdir(parents=True)
    (mine / "mine.yaml").write_text(f"# mine\nweights: {folder / 'weights'}\n")
    short = "stream.sequence_length=200"
    assert compose(["model=mine", short], tmp_path / "conf").model.layers == 2
    (mine / "mine.yaml").write_text(f"# mine\nweights: {folder / 'weights'}\nlayers: 5\n")
    with pytest.raises(UserError, match="model.layers=5 contradicts"):
        compose(["model=mine", short], tmp_path / "conf")


def test_learned_positions_are_not_stretched_and_damage_is_found(folder: Path, tmp_path: Path, monkeypatch) -> None:
    from mmtrain.models.weights import verify_weights

    monkeypatch.chdir(tmp_path)
    foreign_source("opt", tmp_path / "source")
    assert cli.main(["import", "source", "out=weights"]) == 0
    fits = ["model.weights=weights", "corpus.image_size=64", "stream.sequence_length=200"]
    assert compose(fits).model.max_positions == 232
    with pytest.raises(UserError, match="is longer than the 232 positions .* has learned; shorten it$"):
        compose(["model.weights=weights", "stream.sequence_length=512"])
    file = tmp_path / "weights" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="is damaged: model.safetensors is not as it was written"):
        verify_weights(tmp_path / "weights")
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match="is damaged: model.safetensors"):
        compose(fits)

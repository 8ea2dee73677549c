"""Checkpoints: whole or invisible, verified, of the right model, and never a pickle."""

import ast
import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

import mmtrain
from mmtrain.config import Config, UserError
from mmtrain.models import build_model
from mmtrain.train import checkpoint as module
from mmtrain.train.checkpoint import latest_checkpoint, load_model, load_tensors, read_checkpoint, save_checkpoint

VOCABULARY = 256
FINGERPRINT = "0123456789ab"


@pytest.fixture
def config() -> Config:
    config = Config()
    config.model.layers, config.model.width, config.model.heads = 1, 16, 2
    config.stream.sequence_length = 32
    return config


def tensors(config: Config, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model = build_model(config.model, VOCABULARY, 32)
    model.initialize(seed)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {f"{key}.{name}": p + 1 for name, p in parameters.items() for key in ("exp_avg", "exp_avg_sq")}
    return parameters, moments


def save(folder: Path, config: Config, step: int, keep: int = 10) -> Path:
    return save_checkpoint(folder, *tensors(config, step), {"step": step, "vocabulary": FINGERPRINT}, keep)


def test_what_was_saved_comes_back(tmp_path: Path, config: Config) -> None:
    save(tmp_path, config, 7)
    found, complaints = latest_checkpoint(tmp_path)
    assert found is not None and (found.step, complaints) == (7, [])
    for loaded, saved in zip(load_tensors(found), tensors(config, 7), strict=True):
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    model = load_model(found, config, VOCABULARY, FINGERPRINT)
    assert all(torch.equal(p, tensors(config, 7)[0][name]) for name, p in model.named_parameters())


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "missing") == (None, [])
    assert latest_checkpoint(tmp_path) == (None, [])


def test_the_newest_is_used_and_only_keep_remain(tmp_path: Path, config: Config) -> None:
    for step in (5, 10, 15, 100):
        save(tmp_path, config, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000015", "step-00000100"]
    found, _ = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 100


def test_a_damaged_newer_checkpoint_does_not_push_out_the_one_just_written(tmp_path: Path, config: Config) -> None:
    save(tmp_path, config, 5, keep=1)
    flip(save(tmp_path, config, 20) / "state.json")
    save(tmp_path, config, 10, keep=1)
    found, complaints = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 10 and len(complaints) == 1


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(name: str, damage, tmp_path: Path, config) -> None:
    save(tmp_path, config, 5)
    damage(save(tmp_path, config, 10) / name)
    found, (complaint,) = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 5
    assert "step-00000010" in complaint and name in complaint


@pytest.mark.parametrize("content", [None, "", "{}", '{"files": 3}', "[]", '{"files": {"state.json": 1}}'])
def test_a_damaged_manifest_is_a_damaged_checkpoint(content: str | None, tmp_path: Path, config) -> None:
    save(tmp_path, config, 5)
    manifest = save(tmp_path, config, 10) / "MANIFEST.json"
    if content is None:
        manifest.unlink()
    else:
        manifest.write_text(content)
    found, complaints = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 5 and len(complaints) == 1


def test_a_manifest_that_vouches_for_too_little_is_damaged(tmp_path: Path, config: Config) -> None:
    path = save(tmp_path, config, 5)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    del manifest["files"]["model.safetensors"]
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="model.safetensors"):
        read_checkpoint(path)


def test_when_all_are_damaged_training_does_not_start_again_at_0(tmp_path: Path, config: Config) -> None:
    for step in (5, 10):
        flip(save(tmp_path, config, step) / "model.safetensors")
    with pytest.raises(UserError, match="no checkpoint under .* can be read"):
        latest_checkpoint(tmp_path)


def test_a_half_written_checkpoint_is_invisible_and_cleared_away(tmp_path: Path, config: Config, monkeypatch) -> None:
    save(tmp_path, config, 5)

    def power_cut(*_: object) -> None:
        raise KeyboardInterrupt

    half = tmp_path / ".step-00000010.deadbeef.partial"
    shutil.copytree(tmp_path / "step-00000005", half)
    found, complaints = latest_checkpoint(tmp_path)
    assert found is not None and (found.step, complaints) == (5, [])
    save(tmp_path, config, 10)
    assert not half.exists()

    monkeypatch.setattr(module, "_sha256", power_cut)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, config, 15)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000010"]


def test_a_disk_that_is_too_small_is_a_sentence_before_anything_is_written(tmp_path: Path, config, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 900, 100))
    with pytest.raises(UserError, match="no room for a checkpoint in .* free some space"):
        save(tmp_path, config, 5)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_writing_is_a_sentence(tmp_path: Path, config, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, config, 5)
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(UserError, match="checkpoint"):
        save(tmp_path, config, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_another_vocabulary_is_refused(tmp_path: Path, config: Config) -> None:
    save(tmp_path, config, 5)
    found = read_checkpoint(tmp_path / "step-00000005")
    with pytest.raises(UserError, match="another vocabulary"):
        load_model(found, config, VOCABULARY, "ba9876543210")


def without_one(parameters: dict[str, torch.Tensor]) -> None:
    del parameters["blocks.0.ffn.wide.weight"]


def with_one_more(parameters: dict[str, torch.Tensor]) -> None:
    parameters["blocks.1.ffn.wide.weight"] = torch.zeros(2)


def of_another_shape(parameters: dict[str, torch.Tensor]) -> None:
    parameters["blocks.0.ffn.wide.weight"] = torch.zeros(2, 2)


@pytest.mark.parametrize("change", [without_one, with_one_more, of_another_shape])
def test_tensors_of_another_model_are_refused(change, tmp_path: Path, config: Config) -> None:
    parameters, moments = tensors(config)
    change(parameters)
    save_checkpoint(tmp_path, parameters, moments, {"step": 1, "vocabulary": FINGERPRINT}, 1)
    with pytest.raises(UserError, match=r"another model: blocks\.[01]\.ffn\.wide\.weight"):
        load_model(read_checkpoint(tmp_path / "step-00000001"), config, VOCABULARY, FINGERPRINT)


@pytest.mark.parametrize("family", ["llama", "chameleon"])
def test_a_checkpoint_of_another_family_is_refused(family: str, tmp_path: Path, config: Config) -> None:
    path = save(tmp_path, config, 1)
    config.model.family = family
    with pytest.raises(UserError, match="is of another model: blocks.0.attention") as error:
        load_model(read_checkpoint(path), config, VOCABULARY, FINGERPRINT)
    assert "\n" not in str(error.value)


def test_a_pickled_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="no checkpoint under .* can be read"):
        latest_checkpoint(tmp_path)


def test_the_files_are_plain_safetensors_and_json(tmp_path: Path, config: Config) -> None:
    path = save(tmp_path, config, 5)
    assert sorted(file.name for file in path.iterdir()) == sorted([*FILES, "MANIFEST.json"])
    with safetensors.safe_open(path / "model.safetensors", "pt") as file:
        assert "token_embedding.weight" in file.keys()  # noqa: SIM118
    save_file(load_file(path / "model.safetensors"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (path / "model.safetensors").read_bytes()


def test_nothing_in_the_package_can_load_a_pickle() -> None:
    """Pickles run code. numpy's are off by default; nobody may turn them on."""
    forbidden = {"pickle", "cPickle", "dill", "joblib", "shelve", "cloudpickle"}
    for file in Path(mmtrain.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = set()
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").partition(".")[0]}
            assert not names & forbidden, file
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("torch.load", "torch.save"), file
                assert "allow_pickle=True" not in [ast.unparse(keyword) for keyword in node.keywords], file

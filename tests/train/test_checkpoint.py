"""Checkpoints as they are read: verified, of any layout, of the right model, and never a pickle."""

import ast
import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

import mmtrain
from mmtrain.config import Config, UserError
from mmtrain.models import Decoder, build_model
from mmtrain.train import checkpoint as module
from mmtrain.train.checkpoint import (
    fill,
    has_checkpoint,
    latest_checkpoint,
    load_model,
    newest,
    read_checkpoint,
    removable,
)
from mmtrain.train.fragments import PARAMETER, Fragment, whole
from mmtrain.train.saving import Saver, write_durably
from tests.train.small_checkpoint import (
    ALONE,
    FILES,
    ONE_FILE,
    SHAPES,
    cut,
    edit_manifest,
    flip,
    fragments,
    holds,
    names,
    save,
)

VOCABULARY = 256
FINGERPRINT = "0123456789ab"


def test_what_was_saved_comes_back_in_every_layout(tmp_path: Path) -> None:
    save(tmp_path, 7)
    found, complaints = latest_checkpoint(tmp_path)
    assert found is not None and (found.step, complaints) == (7, [])
    for size in (1, 2, 3, 7):
        for rank in range(size):
            held = fragments(0, rank, size)
            fill(found, held)
            assert holds(held, 7)


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", tmp_path):
        assert latest_checkpoint(folder) == (None, [])
        assert newest(folder) is None and not has_checkpoint(folder)


def test_the_newest_is_that_of_the_largest_step_also_beyond_eight_digits(tmp_path: Path) -> None:
    for step in (99_999_999, 123_456_789, 5):
        save(tmp_path, step)
    found, _ = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 123_456_789


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(name: str, damage, tmp_path: Path) -> None:
    save(tmp_path, 5)
    damage(save(tmp_path, 10) / name)
    found, (complaint,) = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 5
    assert "step-00000010" in complaint and name in complaint


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    manifest = save(tmp_path, 5) / "MANIFEST.json"
    whole = manifest.read_bytes()
    for position, byte in enumerate(whole):
        if not chr(byte).isspace():  # which means nothing
            manifest.write_bytes(whole[:position] + bytes([byte ^ 1]) + whole[position + 1 :])
            with pytest.raises(UserError):
                module.read_manifest(manifest.parent)


@pytest.mark.parametrize("content", ["", "{}", '{"files": 3}', "[]", "[" * 10**5, '{"format_version": 2}', "\0\xff"])
def test_a_manifest_that_is_none_is_a_damaged_checkpoint(content: str, tmp_path: Path) -> None:
    save(tmp_path, 5)
    (save(tmp_path, 10) / "MANIFEST.json").write_text(content)
    found, complaints = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 5 and len(complaints) == 1 and "\n" not in complaints[0]


def put(*keys: Any, value: Any):
    """A change of a JSON object at a path of keys."""

    def change(manifest: dict[str, Any]) -> None:
        place = manifest
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


ENTRY = {"bytes": 3, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put("files", "../secret", value=ENTRY), "not one of each rank"),
        (put("files", "/etc/passwd", value=ENTRY), "not one of each rank"),
        (put("files", "tensors-00001-of-00002.safetensors", value=ENTRY), "not one of each rank"),
        (lambda m: m["files"].pop(ONE_FILE), "not one of each rank"),
        (lambda m: m["files"].pop("state.json"), "not one of each rank"),
        (put("files", "state.json", "bytes", value=-1), "a size or a checksum is none"),
        (put("files", "state.json", "bytes", value=True), "a size or a checksum is none"),
        (put("files", "state.json", "sha256", value="x"), "a size or a checksum is none"),
        (put("shapes", "norm", value=[-8]), "a shape is none"),
        (put("shapes", "norm", value="8"), "a shape is none"),
        (put("step", value="7"), "is no such value"),
        (put("step", value=8), "state.json is of step 7"),
        (put("permanent", value=1), "is no such value"),
        (put("time", value=None), "damaged"),
        (put("format_version", value=1), "has format 1; this version of mmtrain reads 2"),
        (put("format_version", value=3), "has format 3; this version of mmtrain reads 2"),
    ],
)
def test_a_hostile_manifest_is_one_sentence(change, sentence: str, tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    edit_manifest(path, change)
    with pytest.raises(UserError, match=sentence) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [lambda path, to: path.symlink_to(to), lambda path, _: os.mkfifo(path)])
def test_links_and_pipes_are_no_files_of_a_checkpoint(make, tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    outside = (path / ONE_FILE).rename(tmp_path / "outside")
    make(path / ONE_FILE, outside)
    with pytest.raises(UserError, match="is no plain file"):
        read_checkpoint(path)


def write_tensor_file(path: Path, header: dict[str, Any], num_floats: int) -> None:
    """Put another tensor file into a checkpoint, vouched for by its manifest."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    entry = write_durably(path / ONE_FILE, [len(text).to_bytes(8, "little"), text, bytes(4 * num_floats)])
    edit_manifest(path, lambda m: m["files"].update({ONE_FILE: entry}))


@pytest.mark.parametrize(
    ("starts", "length", "dtype", "sentence"),
    [
        ({"norm": -1}, 8, "F32", "do not cover"),
        ({"norm": 10**30}, 8, "F32", "do not cover"),
        ({"norm": 1}, 8, "F32", "do not cover"),
        ({"norm": 0}, 7, "F32", "do not cover"),
        ({"norm": 0}, 9, "F32", "do not cover"),
        ({"norm": 0, "other": 0}, 8, "F32", "do not cover"),
        ({"norm": 0.0}, 8, "F32", "no piece of a flat float32"),
        ({"norm": 0}, 8, "I32", "no piece of a flat float32"),
        ({}, 8, "F32", "damaged"),
        ([], 8, "F32", "damaged"),
    ],
)
def test_hostile_pieces_are_one_sentence(starts: Any, length: int, dtype: str, sentence: str, tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    edit_manifest(path, put("shapes", value={"norm": [8]}))
    header = {"__metadata__": {"starts": json.dumps(starts)}}
    end = 0
    for name in [*starts] or ["norm"]:
        header[f"parameter.{name}"] = {"dtype": dtype, "shape": [length], "data_offsets": [end, end + 4 * length]}
        end += 4 * length
    write_tensor_file(path, header, end // 4)
    with pytest.raises(UserError, match=sentence) as error:
        module.load_parameters(read_checkpoint(path))
    assert "\n" not in str(error.value)


def test_overlapping_pieces_and_pieces_in_two_files_are_told_apart(tmp_path: Path) -> None:
    first, second = (tmp_path / name for name in ("a", "b"))

    def write(*pieces: tuple[int, int]) -> None:
        for file, (start, length) in zip((first, second), pieces, strict=True):
            save_file({"parameter.norm": torch.ones(length)}, file, {"starts": json.dumps({"norm": start})})

    for pieces in (((0, 5), (4, 4)), ((0, 8), (4, 4)), ((0, 8), (0, 8)), ((0, 4), (5, 3))):
        write(*pieces)
        with contextlib.ExitStack() as stack, pytest.raises(UserError, match=r"parameter\.norm do not cover"):
            module.open_pieces(tmp_path, {"norm": [8]}, ["a", "b"], stack)
    write((0, 5), (5, 3))
    with contextlib.ExitStack() as stack:
        found = module.open_pieces(tmp_path, {"norm": [8]}, ["b", "a"], stack)
        assert [piece.start for piece in found["parameter.norm"]] == [0, 5]


def test_the_shape_of_a_parameter_takes_no_memory_before_its_file_vouches_for_it(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    edit_manifest(path, put("shapes", "norm", value=[2**45]))
    with pytest.raises(UserError, match=r"norm do not cover its shape \[35184372088832\] exactly"):
        module.load_parameters(read_checkpoint(path))


def test_what_the_checkpoint_of_another_optimizer_lacks_is_named(tmp_path: Path) -> None:
    found = read_checkpoint(save(tmp_path, 7))
    held = whole({"norm": {PARAMETER: torch.zeros(8), "momentum_buffer": torch.zeros(8)}})
    with pytest.raises(UserError, match=r"lacks elements of momentum_buffer\.norm"):
        fill(found, held)
    with pytest.raises(UserError, match=r"lacks elements of parameter\.norm"):
        fill(found, [Fragment("norm", 4, {PARAMETER: torch.zeros(8)})])


def test_when_all_are_damaged_training_does_not_start_again_at_0(tmp_path: Path) -> None:
    for step in (5, 10):
        flip(save(tmp_path, step) / ONE_FILE)
    with pytest.raises(UserError, match="no checkpoint under .* can be read"):
        latest_checkpoint(tmp_path)


def test_a_launcher_asks_for_the_newest_without_reading_tensors(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, 5)
    cut(save(tmp_path, 10) / ONE_FILE)
    monkeypatch.setattr(module.hashlib, "file_digest", lambda *_: pytest.fail("hashed"))
    found = newest(tmp_path)
    assert found is not None and found.step == 5


def test_what_may_be_removed_is_old_sound_and_not_for_good(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 25, 30):
        save(tmp_path, step, keep_every=10)
    flip(tmp_path / "step-00000005" / "MANIFEST.json")
    cut(tmp_path / "step-00000025" / ONE_FILE)
    assert removable(tmp_path, 1) == []
    save(tmp_path, 25)
    assert [path.name for path in removable(tmp_path, 1)] == ["step-00000015"]
    assert [path.name for path in removable(tmp_path, 1, last=20)] == []


def model_config() -> Config:
    config = Config()
    config.model.layers, config.model.width, config.model.heads = 1, 16, 2
    config.stream.sequence_length = 32
    return config


def save_model(folder: Path, change=lambda parameters: None) -> tuple[Path, Decoder]:
    model = build_model(model_config().model, VOCABULARY, 32)
    model.initialize(3)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    change(parameters)
    shapes = {name: list(p.shape) for name, p in parameters.items()}
    saver = Saver(folder, ALONE, keep=1, asynchronous=False)
    owned = whole({name: {PARAMETER: p} for name, p in parameters.items()})
    saver.save(owned, shapes, {"step": 1, "vocabulary": FINGERPRINT})
    assert saver.wait() is None
    return folder / "step-00000001", model


def test_the_model_of_a_checkpoint_is_the_one_saved(tmp_path: Path) -> None:
    path, saved = save_model(tmp_path)
    model = load_model(read_checkpoint(path), model_config(), VOCABULARY, FINGERPRINT)
    expected = dict(saved.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    with pytest.raises(UserError, match="another vocabulary"):
        load_model(read_checkpoint(path), model_config(), VOCABULARY, "ba9876543210")


def without_one(parameters: dict[str, torch.Tensor]) -> None:
    del parameters["blocks.0.ffn.wide.weight"]


def with_one_more(parameters: dict[str, torch.Tensor]) -> None:
    parameters["blocks.1.ffn.wide.weight"] = torch.zeros(2)


def of_another_shape(parameters: dict[str, torch.Tensor]) -> None:
    parameters["blocks.0.ffn.wide.weight"] = torch.zeros(2, 2)


@pytest.mark.parametrize("change", [without_one, with_one_more, of_another_shape])
def test_tensors_of_another_model_are_refused(change, tmp_path: Path) -> None:
    path, _ = save_model(tmp_path, change)
    with pytest.raises(UserError, match=r"another model: blocks\.[01]\.ffn\.wide\.weight"):
        load_model(read_checkpoint(path), model_config(), VOCABULARY, FINGERPRINT)


@pytest.mark.parametrize("family", ["llama", "chameleon"])
def test_a_checkpoint_of_another_family_is_refused(family: str, tmp_path: Path) -> None:
    path, _ = save_model(tmp_path)
    config = model_config()
    config.model.family = family
    with pytest.raises(UserError, match="is of another model: blocks.0.attention") as error:
        load_model(read_checkpoint(path), config, VOCABULARY, FINGERPRINT)
    assert "\n" not in str(error.value)


def test_a_pickled_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="no checkpoint under .* can be read"):
        latest_checkpoint(tmp_path)


def test_the_files_are_plain_safetensors_and_json(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    assert names(path) == sorted(FILES)
    tensors = load_file(path / ONE_FILE)
    assert {name: tensor.shape for name, tensor in tensors.items() if name.startswith("exp_avg.")} == {
        "exp_avg.embedding": (128,),
        "exp_avg.block.weight": (64,),
        "exp_avg.norm": (8,),
    }
    with safetensors.safe_open(path / ONE_FILE, "pt") as file:
        assert json.loads(file.metadata()["starts"]) == dict.fromkeys(SHAPES, 0)


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

"""`mmtrain checkpoint`: what is there, whether it is sound, what may go, and what differs."""

from pathlib import Path

import pytest

from mmtrain import cli
from mmtrain.train.fragments import Fragment
from mmtrain.train.saving import Saver
from mmtrain.verbs import checkpoint as verb
from tests.train.small_checkpoint import ALONE, ONE_FILE, SHAPES, flip, fragments, names, save


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the last run that was trained has its checkpoints: steps 5, 10 (for good), 15 and 25."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "last-one" / "checkpoints"
    for step in (5, 10, 15, 25):
        save(folder, step, keep_every=10)
    (folder.parent / "config.yaml").write_text("")
    (tmp_path / "runs" / "last").write_text("last-one")
    return folder


def mmtrain(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = cli.main(["checkpoint", *words])
    return code, "".join(capsys.readouterr())


def test_ls_shows_every_checkpoint_and_which_is_not_complete(folder: Path, capsys) -> None:
    (folder / "step-00000015" / "MANIFEST.json").unlink()
    code, said = mmtrain(capsys)
    lines = said.splitlines()
    assert code == 0 and [line.split()[:2] for line in lines[1:3]] == [["step-00000025", "25"], ["step-00000015", "15"]]
    assert "no: checkpoint" in lines[2] and "MANIFEST.json is missing" in said
    assert lines[-1].split()[0] == "step-00000005" and lines[-1].split()[-2:] == ["no", "yes"]
    assert lines[-2].split()[0] == "step-00000010" and lines[-2].split()[-2:] == ["yes", "yes"]
    assert mmtrain(capsys, "ls", "run=runs/last-one") == (0, said)
    (folder.parent.parent / "new").mkdir()
    (folder.parent.parent / "new" / "config.yaml").write_text("")
    assert mmtrain(capsys, "ls", "run=runs/new")[1].startswith("there is no checkpoint in")


def test_verify_names_every_bad_file(folder: Path, capsys) -> None:
    assert mmtrain(capsys, "verify")[0] == 0
    for name in (ONE_FILE, "state.json"):
        flip(folder / "step-00000010" / name)
    code, said = mmtrain(capsys, "verify")
    assert code == 1 and said.count("sound") == 3
    assert f"{ONE_FILE} is not what its manifest says" in said and "state.json is not what" in said
    assert mmtrain(capsys, "verify", "5", "step-00000015")[0] == 0
    assert mmtrain(capsys, "verify", str(folder / "step-00000010"))[0] == 1


def test_prune_leaves_the_newest_those_for_good_and_the_one_that_is_sound(folder: Path, capsys) -> None:
    everything = names(folder)
    code, said = mmtrain(capsys, "prune", "keep=1", "dry")
    assert code == 0 and "would remove step-00000015, 0.0 MB" in said and names(folder) == everything
    flip(folder / "step-00000025" / ONE_FILE)
    code, said = mmtrain(capsys, "prune", "keep=1")
    assert code == 0 and "step-00000025 is damaged" in said and "removed step-00000005" in said
    assert names(folder) == ["step-00000010", "step-00000015", "step-00000025"]


@pytest.mark.parametrize("words", [["prune"], ["prune", "keep=0"], ["prune", "keep=1", "keep=2"], ["prune", "keep=x"]])
def test_prune_without_a_number_removes_nothing(words: list[str], folder: Path, capsys) -> None:
    code, said = mmtrain(capsys, *words)
    assert code == 2 and "mmtrain checkpoint prune keep=2" in said and len(names(folder)) == 4


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["ls", "5"], "means nothing"),
        (["prune", "wet", "keep=1"], "means nothing"),
        (["diff", "5"], "means nothing"),
        (["diff", "5", "7"], "7 is no checkpoint of"),
        (["verify", "keep=1"], "means nothing"),
        (["ls", "train.steps=1"], "takes run="),
        (["ls", "run=nowhere"], "nowhere is no run directory"),
    ],
)
def test_what_means_nothing_is_one_sentence(words: list[str], sentence: str, folder: Path, capsys) -> None:
    code, said = mmtrain(capsys, *words)
    assert code == 2 and sentence in said and said.count("\n") == 1


def save_as(folder: Path, parts: list[Fragment], **state: object) -> str:
    saver = Saver(folder, ALONE, keep=1, asynchronous=False)
    saver.save(parts, SHAPES, {"step": 5, **state})
    assert saver.wait() is None
    return str(folder / "step-00000005")


def test_diff_of_what_is_equal_says_so(folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(verb, "CHUNK", 7)
    code, said = mmtrain(capsys, "diff", "5", save_as(folder.parent / "other", fragments(5)))
    assert code == 0 and said.splitlines()[-1] == "tensors: equal bit for bit; state: equal"


def test_diff_finds_the_one_number_and_the_one_key_that_differ(folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(verb, "CHUNK", 7)
    parts = fragments(5)
    number = float(parts[1].tensors["exp_avg"][33])
    parts[1].tensors["exp_avg"][33] = number + 0.5
    largest = max(float(parts[1].tensors["exp_avg"].abs().max()), abs(number))
    other = save_as(folder.parent / "other", parts, stream={"lanes": {"0": [1]}})
    code, said = mmtrain(capsys, "diff", "5", other)
    rows = {line.split()[0]: line.split() for line in said.splitlines()}
    assert code == 1 and "tensors: not equal; state: not equal" in said
    assert rows["parameter"][1:3] == rows["exp_avg_sq"][1:3] == ["3", "0"] and rows["exp_avg"][1:3] == ["3", "1"]
    assert float(rows["exp_avg"][3]) == pytest.approx(0.5, rel=1e-3)
    assert float(rows["exp_avg"][4]) == pytest.approx(0.5 / largest, rel=1e-3)
    assert rows["exp_avg"][5] == "block.weight" and "state.json: stream.lanes.0: absent | [1]" in said


@pytest.mark.parametrize(("before", "after", "shown"), [(0.0, -0.0, "e-324"), (1.0, float("nan"), "inf")])
def test_diff_sees_what_arithmetic_does_not(before: float, after: float, shown: str, folder: Path, capsys) -> None:
    places = []
    for number in (before, after):
        parts = fragments(5)
        parts[0].tensors["parameter"][:] = 0.0
        parts[0].tensors["parameter"][3] = number
        parts[0].tensors["parameter"][4] = float("nan")  # equal in both
        places.append(save_as(folder.parent / f"other{number}", parts))
    code, said = mmtrain(capsys, "diff", *places)
    assert code == 1 and shown in said and "tensors: not equal; state: equal" in said
    assert mmtrain(capsys, "diff", places[1], places[1])[0] == 0

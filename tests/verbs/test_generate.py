"""`mmtrain generate` on a run with real tokenizers, shards and checkpoint; its model was not trained."""

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmtrain import cli
from mmtrain.config import Config
from mmtrain.config.compose import freeze
from mmtrain.flops import Ledger
from mmtrain.models import build_model, num_positions
from mmtrain.retrieval import Memory
from mmtrain.tokens import Vocabulary
from mmtrain.train.distributed import World
from mmtrain.train.fragments import PARAMETER, whole
from mmtrain.train.saving import Saver
from mmtrain.verbs import generate as verb
from mmtrain.verbs.prepare import prepare
from mmtrain.verbs.prepared import PreparedCorpus

SIZE = 32


@pytest.fixture(scope="module")
def folder(shapes: tuple[Config, PreparedCorpus], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/smoke, in float32, and pictures: red.png and blue.png."""
    config, _ = shapes
    config.engine.dtype, config.model.init_std, config.model.zero_init_outputs = "fp32", 0.2, False
    folder = tmp_path_factory.mktemp("generate")
    run = folder / "runs" / "smoke"
    run.mkdir(parents=True)
    (folder / "runs" / "last").write_text("smoke")
    freeze(config, run / "config.yaml")
    artifacts = prepare(config)
    artifacts.save(run)
    Ledger().save(run / "ledger.json")
    vocabulary = Vocabulary.load(artifacts.tokens[artifacts.main] / "vocabulary.json")
    model = build_model(config.model, vocabulary.size, num_positions(config))
    model.initialize(0)
    state = {"step": 7, "tokens": 0, "vocabulary": vocabulary.fingerprint}
    parameters = dict(model.named_parameters())
    saver = Saver(run / "checkpoints", World(0, 1, torch.device("cpu")), keep=1)
    owned = whole({name: {PARAMETER: p} for name, p in parameters.items()})
    saver.save(owned, {name: list(p.shape) for name, p in parameters.items()}, state)
    assert saver.wait() is None
    for color in ("red", "blue"):
        Image.new("RGB", (50, 40), color).save(folder / f"{color}.png")
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def generate(*words: str, out: str) -> dict:
    """The record of `mmtrain generate WORDS`, written into the folder `out`."""
    assert cli.main(["generate", *words, f"generate.out={out}"]) == 0
    return json.loads(Path(out, "samples.json").read_text())


def files(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_the_same_command_writes_the_same_bytes_into_its_own_folder() -> None:
    words = ["generate", "a red circle", "two blue squares", "generate.num_samples=2"]
    samples = Path("runs/smoke/samples")
    assert cli.main(words) == 0
    (first,) = samples.iterdir()
    before = files(first)
    assert cli.main(words) == 0
    assert list(samples.iterdir()) == [first] and files(first) == before
    assert cli.main([*words, "generate.seed=1"]) == cli.main([words[0], "a green circle", *words[2:]]) == 0
    assert len(list(samples.iterdir())) == 3 and files(first) == before
    record = json.loads(before["samples.json"])
    assert {sample["file"] for sample in record["samples"]} | {"grid.png", "samples.json"} == set(before)
    assert record["checkpoint"] == "smoke/step-00000007"
    assert len(record["checkpoint_fingerprint"]) == len(record["vocabulary"]) == 12
    assert record["settings"]["guidance"] == 3 and record["settings"]["num_samples"] == 2
    assert all(s["tokens"] == 16 and s["log_probability"] < 0 and len(s["seed"]) == 6 for s in record["samples"])


def test_a_prompt_is_the_same_alone_and_among_others() -> None:
    words = ["two", "a red circle", "a blue square"]
    many = generate(*words, "generate.num_samples=2", "generate.batch_size=5", out="many")
    one = generate("a red circle", "generate.num_samples=2", out="one")
    assert [s["prompt"] for s in many["samples"]] == [word for word in words for _ in range(2)]
    for a, b in zip(many["samples"][2:4], one["samples"], strict=True):
        assert Path("many", a["file"]).read_bytes() == Path("one", b["file"]).read_bytes()
        assert a["seed"] == b["seed"] and a["log_probability"] == pytest.approx(b["log_probability"], abs=1e-3)


def test_prompts_come_from_lines_and_from_stdin_with_seeds_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = '\ufefftwo = 2\n\n{"prompt": "a red circle", "seed": 5}\r\n{"prompt": "a red circle"}\n'
    lines += '{"prompt": "\\ud800"}\n'
    Path("prompts.txt").write_text(lines, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    few = "generate.num_samples=1"
    read = generate("generate.prompts_file=prompts.txt", few, out="read")
    piped = generate("generate.prompts_file=-", few, out="piped")
    assert [(s["prompt"], s["seed"][0]) for s in read["samples"]] == [
        ("two = 2", 0), ("a red circle", 5), ("a red circle", 0), ("?", 0),
    ]  # fmt: skip
    assert piped["samples"] == read["samples"]
    quoted = generate('generate.prompts=["two = 2"]', few, out="quoted")
    alone, in_batch = quoted["samples"][0], read["samples"][0]
    # The last digit of a sum may depend on the batch; what is drawn does not.
    assert alone.pop("log_probability") == pytest.approx(in_batch.pop("log_probability"), rel=1e-5)
    assert alone == in_batch


def test_every_task_leaves_its_files(capsys: pytest.CaptureFixture) -> None:
    few = "generate.num_samples=2"
    for task, words in (("question", ["which color?"]), ("infill_text", ["a [MASK] circle on [MASK]"])):
        record = generate(f"generate.task={task}", *words, "generate.pictures=[red.png]", few, out=task)
        assert set(files(task)) == {"samples.json"}
        assert [s["picture"] for s in record["samples"]] == ["red.png"] * 2
        assert f"{words[0]}: " in capsys.readouterr().out
    assert record["samples"][0]["text"].startswith("a")

    record = generate("generate.task=caption", "red.png", "blue.png", few, out="caption")
    assert [s["prompt"] for s in record["samples"]] == ["red.png"] * 2 + ["blue.png"] * 2

    region = ["generate.task=infill_image", "generate.region=[8,0,16,17]", "generate.pictures=[red.png,blue.png]", few]
    record = generate(*region, out="infill_image")
    assert [s["prompt"] for s in record["samples"]] == ["red.png"] * 2 + ["blue.png"] * 2
    pixels = np.asarray(Image.open(Path("infill_image", record["samples"][2]["file"])))
    assert (pixels[8:24, 16:] == (0, 0, 255)).all() and (pixels[:3] == 255).all(axis=-1)[:, 16:].all()
    assert not (pixels[8:24, 8:16] == (0, 0, 255)).all()

    record = generate("generate.task=interleaved", "a page", "generate.num_samples=8", out="interleaved")
    pages = [s for s in record["samples"] if s["pictures"]]
    assert pages
    for sample in pages:
        page = Path("interleaved", sample["file"]).read_text()
        assert page.startswith("a page\n\n")
        assert all(f"![]({name})" in page and Path("interleaved", name).is_file() for name in sample["pictures"])


def test_a_signal_keeps_what_was_drawn_and_the_same_command_draws_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ("a red circle", "two blue squares", "generate.num_samples=2", "generate.batch_size=1")
    whole = generate(*words, out="whole")
    original, written = verb.write_sample, []

    def write_sample(*rest: Any) -> Any:
        written.append(True)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*rest)

    monkeypatch.setattr(verb, "write_sample", write_sample)
    cut = generate(*words, out="cut")
    assert whole["complete"] and not cut["complete"] and cut["samples"] == whole["samples"][:3]
    assert "stopped after 3 of 4 samples" in capsys.readouterr().out
    assert generate(*words, out="cut") == whole and files("cut") == files("whole")


def test_examples_and_the_best_of_several() -> None:
    words = ["a red circle", "generate.num_samples=1", "generate.guidance=1"]
    plain = generate(*words, "generate.retrieve=false", out="plain")
    shown = generate(*words, 'generate.examples=["red.png=a red one","blue.png=b = blue"]', out="shown")
    assert [r["samples"][0]["retrieved"] for r in (plain, shown)] == [0, 2]
    best = generate(*words, "generate.best_of=3", out="best")["samples"][0]
    assert len(best["scores"]) == 3 and best["seed"][-1] == int(np.argmax(best["scores"]))


def test_without_prompts_it_takes_held_out_documents_and_books_what_it_computes() -> None:
    before = Ledger.read(Path("runs/smoke/ledger.json"))["sampling"]
    drawn = generate("generate.num_samples=1", out="held_out")
    assert len(drawn["samples"]) == 4
    assert Ledger.read(Path("runs/smoke/ledger.json"))["sampling"] > before
    read = generate("generate.task=caption", "generate.num_samples=1", out="held_out_read")
    assert len(read["samples"]) == 4 and all(s["text"] for s in read["samples"])


def test_a_terminal_sees_the_text_as_it_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    record = generate("generate.task=caption", "red.png", "generate.num_samples=1", "generate.seed=3", out="seen")
    out = capsys.readouterr().out
    assert out.startswith("red.png: ") and out.count("red.png: ") == 1
    assert len(out.partition("╭")[0]) >= len(record["samples"][0]["text"]) // 2


STRANGE = {
    "gray16.png": lambda path: Image.fromarray(np.full((9, 9), 0x8000, np.uint16)).save(path),
    "palette.png": lambda path: Image.new("P", (9, 9), 3).save(path),
    "alpha.png": lambda path: Image.new("RGBA", (9, 9), (255, 0, 0, 100)).save(path),
    "cmyk.jpg": lambda path: Image.new("CMYK", (9, 9)).save(path),
    "thin.png": lambda path: Image.new("RGB", (1, 5000)).save(path),
    "one_bit.webp.txt": lambda path: Image.new("1", (9, 9)).convert("RGB").save(path, "WEBP"),
    "moving.webp": lambda path: Image.new("RGB", (9, 9)).save(
        path, save_all=True, append_images=[Image.new("RGB", (9, 9), "red")]
    ),
    "phone.jpg": lambda path: Image.new("RGB", (9, 9)).save(
        path, "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))]
    ),
}


def test_pictures_of_strange_modes_and_shapes_are_read(capsys: pytest.CaptureFixture) -> None:
    for name, write in STRANGE.items():
        write(Path(name))
    record = generate("generate.task=caption", *STRANGE, "generate.num_samples=1", out="strange")
    assert [s["prompt"] for s in record["samples"]] == list(STRANGE)


BAD = [
    (["generate.task=caption", "empty.png"], "picture empty.png cannot be read (empty file"),
    (["generate.task=caption", "words.png"], "picture words.png cannot be read (not a PNG, JPEG or WebP picture"),
    (["generate.task=caption", "missing.png"], "picture missing.png cannot be read (there is no such file)"),
    (["generate.task=caption", "movie.gif"], "picture movie.gif cannot be read (not a PNG"),
    (["generate.task=caption", "cut.png"], "picture cut.png cannot be read ("),
    (["generate.task=caption", "huge.png", "corpus.max_pixels=999"], "too many pixels"),
    (["generate.task=caption", "generate.pictures=[red.png]"], "takes no generate.pictures; give the files as prompts"),
    (["a", "generate.pictures=[red.png]"], "takes no generate.pictures; leave generate.pictures out"),
    (["generate.task=question", "why?"], "prompt 1 has no picture"),
    (["generate.task=question", "a", "b", "c", "generate.pictures=[red.png,blue.png]"], "has 2 files for 3 prompts"),
    (["generate.task=question"], "generate.task=question needs prompts"),
    (["generate.task=infill_text", "a red circle"], "prompt 1 has no [MASK]"),
    (["generate.task=infill_image", "generate.pictures=[red.png]"], "region=[] must be [left,top,right,bottom]"),
    (["generate.task=infill_image", "generate.pictures=[red.png]", "generate.region=[0,0,9,99]"], "is no rectangle"),
    (["a", "generate.region=[0,0,8,8]"], "generate.region is for generate.task=infill_image, not image"),
    (["a", "generate.out=red.png/under"], "red.png/under cannot be written"),
    (["a", " "], "prompt 2 is empty; write a caption"),
    (["very long " * 100], "exceed the model's 128 positions"),
    (["a", "generate.prompts=[b]"], "prompts come from words and generate.prompts; use one of them"),
    (["two = 2"], "'two = 2' holds '=', which makes it a setting"),
    (["generate.seed"], "generate.seed is a setting without a value"),
    (["generate.prompts_file=nowhere.txt"], "the prompts of nowhere.txt cannot be read"),
    (["generate.prompts_file=latin.txt"], "the prompts of latin.txt cannot be read"),
    (["generate.prompts_file=blank.txt"], "blank.txt has no prompt"),
    (["generate.prompts_file=broken.jsonl"], "line 2 of broken.jsonl is no JSON object"),
    (["generate.prompts_file=unknown.jsonl"], "line 1 of unknown.jsonl has the unknown key 'sed'"),
    (["generate.prompts_file=typed.jsonl"], "line 1 of typed.jsonl: seed must be a whole number"),
    (["a", "generate.guidance=2", "generate.contrastive_k=3"], "give one"),
    (["generate.task=caption", "red.png", "generate.contrastive_k=3"], "generate.contrastive_k is for generate.task="),
    (["a", "generate.top_p=0"], "top_p=0.0 keeps no token"),
    (["a", "generate.retrieval_guidance=2", "generate.retrieve=false"], "needs retrieved documents"),
    (["a", "generate.examples=[red.png]"], "an example is PICTURE=CAPTION"),
    (["a", "generate.examples=['red.png=" + "long " * 200 + "']"], "give fewer or shorter examples"),
    (["generate.task=caption", "red.png", "generate.scorer=caption"], "generate.scorer=caption judges a drawn picture"),
    (["a", "generate.checkpoint=step-00000009"], "has no checkpoint step-00000009; there is step-00000007"),
    (["generate.task=interleaved", "a", "generate.max_tokens=1"], "generate.max_tokens=1 is too little"),
    (["a", "generate.out=taken"], "taken holds other files"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "sentence"), BAD, ids=[sentence[:40] for _, sentence in BAD])
def test_bad_input_is_one_sentence_and_nothing_is_written(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "runs").symlink_to(Path("runs").absolute())
    for color in ("red", "blue"):
        (tmp_path / f"{color}.png").write_bytes(Path(f"{color}.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    Path("empty.png").touch()
    Path("words.png").write_text("no picture")
    Path("cut.png").write_bytes(Path("red.png").read_bytes()[:60])
    Image.new("RGB", (9, 9)).save("movie.gif")
    Image.new("RGB", (99, 99)).save("huge.png")
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("blank.txt").write_text("\n \n")
    Path("broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a\n')
    Path("unknown.jsonl").write_text('{"prompt": "a", "sed": 1}\n')
    Path("typed.jsonl").write_text('{"prompt": "a", "seed": "1"}\n')
    Path("taken").mkdir()
    Path("taken/mine.txt").write_text("mine")
    before = sorted(path for path in tmp_path.rglob("*"))
    samples = sorted(Path("runs/smoke").rglob("*"))
    assert cli.main(["generate", *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and error.startswith("mmtrain: ")
    assert sorted(path for path in tmp_path.rglob("*")) == before and sorted(Path("runs/smoke").rglob("*")) == samples


def test_the_memory_is_searched_by_text_by_picture_or_by_both(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, bool]] = []
    original = Memory.search

    def search(self: Memory, text: str | None, pixels: np.ndarray | None, k: int) -> list[int]:
        asked.append((bool(text), pixels is not None))
        found = original(self, text, pixels, k)
        assert len(found) == k
        return found

    monkeypatch.setattr(Memory, "search", search)
    ask = ["what is it?", "generate.task=question", "generate.pictures=[red.png]", "generate.max_text_tokens=2"]
    for number, by in enumerate(("given", "text", "image")):
        generate(*ask, f"generate.retrieve_by={by}", out=f"by-{number}")
    assert asked == [(True, True), (True, False), (False, True)]
    generate("a red circle", "generate.retrieve_by=image", "generate.num_samples=1", out="by-3")
    assert asked[3] == (True, False)  # there is nothing else to search by

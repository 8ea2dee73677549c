"""What the documentation says exists: commands compose, settings are settings, files and links are there."""

import contextlib
import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mmtrain.config import Config, TrackConfig, UserError
from mmtrain.config.compose import compose, with_overrides
from mmtrain.config.listing import groups
from mmtrain.config.override import read_override
from mmtrain.config.search import plan_search, with_name
from mmtrain.config.suggest import known_keys, section_names
from mmtrain.config.sweep import expand
from mmtrain.config.validate import walk
from mmtrain.tokens import TokenDocument, TokenSegment, Vocabulary
from mmtrain.verbs import data
from mmtrain.verbs.help import CONFIGURED, OF_A_RUN, VERBS
from tests.metric_table import table

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *(page for page in [ROOT / "README.md"] if page.exists())])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
SHELLS = ("bash", "sh", "console", "shell")
TOP_FOLDERS = ("mmtrain", "conf", "launch", "tests", "docs")
FILE_SUFFIXES = {".safetensors", ".json", ".jsonl", ".yaml", ".md", ".py", ".html", ".npy"}
# Files that an example tells the reader to make.
OF_THE_READER = {"conf/experiment/mine.yaml"}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
SETTING = re.compile(r"[a-z_]+(?:\.[a-z_0-9]+)*=\S+")
# In place of a real word: `mmtrain VERB --help`, `mmtrain train ...`.
PLACEHOLDERS = {"VERB", "...", "…", "KEY=VALUE", "GROUP=OPTION", "[settings]"}


options = cache(groups)


@cache
def defaults() -> Config:
    return compose([])


def inline_codes(page: Path) -> list[str]:
    return INLINE.findall(FENCE.sub("", page.read_text()))


def shell_lines(page: Path) -> list[str]:
    """Lines of the blocks that are to be typed, continued lines joined."""
    blocks = [block for language, block in FENCE.findall(page.read_text()) if language in SHELLS]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def commands(page: Path) -> list[list[str]]:
    """Words of every mmtrain command on a page, and of the scripts that hand their words to `mmtrain train`."""
    found = []
    for line in [*inline_codes(page), *shell_lines(page)]:
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # CUDA_VISIBLE_DEVICES=0 mmtrain ...
            words = words[1:]
        if words[:1] == ["mmtrain"]:
            found.append(words[1:])
        elif words[:2] == ["bash", "launch/quickstart.sh"]:
            found.append(["train", "experiment=quickstart", *words[2:]])
        elif words[:2] == ["sbatch", "launch/slurm.sbatch"]:
            found.append(["train", *words[2:]])
    return found


def check_command(words: list[str]) -> None:
    """Raise where the command line would refuse the words before it does anything."""
    words = [word for word in words if word not in PLACEHOLDERS]
    if not words or words in (["--help"], ["--version"]):
        return
    verb, *rest = words
    assert verb in VERBS, f"{verb} is not a verb"
    settings = [word for word in rest if "=" in word and not word.startswith("-")]
    others = [word for word in rest if word not in settings]
    if verb == "ls":
        assert set(others) <= set(options()), others
        return
    allowed = {"--help", "--cfg", "job", "--config-dir", "my_conf"}
    parts = {"tokenizer": {"text", "image"}, "flops": {"ls", "show", "count"}, "doctor": {"--json"}, "plan": {"--json"}}
    parts |= {"train": {"prepare", "-m"}, "retrieval": {"train-encoder", "join", "inspect", "100"}}
    if verb in ("export", "import"):
        keys = {word.partition("=")[0] for word in settings}
        assert keys <= {"run", "name", "out", "dtype", "shard_bytes"}, settings
        assert len(others) <= (verb == "import"), others
        return
    if verb == "report" and others[:1] in (["compare"], ["scaling"]):
        assert all(word.startswith(("out=", "flops=")) for word in settings), settings
        return
    if verb == "sweep":
        assert others in ([], ["wandb"], ["ladder"]), others
        if settings and others == ["ladder"]:
            expand(with_name(settings, "ladder"))
        elif settings:
            plan_search(settings)
        return
    if verb == "runs":
        assert others[:1] in ([], ["ls"], ["show"], ["compare"], ["watch"]), others
        assert {word.partition("=")[0] for word in settings} <= {"root", "out", "every"}, settings
        return
    if verb == "sync":
        assert not settings, settings
        return
    if verb == "checkpoint":
        assert others[:1] in (["ls"], ["verify"], ["prune"], ["diff"]), others
        return
    if verb == "report" and others == ["ablation"]:
        assert {word.partition("=")[0] for word in settings} <= {"sweep", "baseline"}, settings
        return
    parts["data"] = {*data.STEPS, *data.LOOKS, "json", "50"}
    allowed |= parts.get(verb, set())
    if verb == "flops" and others[:1] == ["show"]:
        from mmtrain.flops import load_registry

        assert others[1] in {baseline.id for baseline in load_registry(text_models=True)}
        return
    if verb == "flops" and len(others) == 2 and others[0] == "count":
        from mmtrain.flops.diffusion_networks import NETWORKS

        assert others[1] in {*options()["model"], *NETWORKS}
        return
    if verb == "flops" and others[:1] == ["compare"]:
        return
    if verb == "report":
        others = [word for word in others if word not in ("compare", "ablation") and not word.startswith("runs/")]
    # Words of `mmtrain generate` are prompts, whatever they are.
    assert verb == "generate" or set(others) <= allowed, others
    if verb in OF_A_RUN and not any(word.startswith("experiment=") for word in settings):
        settings = [word for word in settings if word.partition("=")[0] not in ("run", "root", "name")]
        with_overrides(defaults(), settings)
    elif "-m" in others and settings:
        expand(settings)
    elif verb in CONFIGURED:
        compose([word for word in settings if not word.startswith("model.weights=")])  # a folder that the reader makes


@pytest.mark.parametrize("name", NAMES)
def test_every_command_composes(name: str) -> None:
    for words in commands(ROOT / name):
        try:
            check_command(words)
        except UserError as error:
            pytest.fail(f"{name}: mmtrain {shlex.join(words)}: {error}")


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_one(name: str) -> None:
    choices = {key: field.metadata["choices"] for key, _, field in walk(Config())}
    key_like = re.compile(rf"(?:{'|'.join(section_names())})\.[a-z_0-9]+")
    for code in sorted(set(inline_codes(ROOT / name))):
        if SETTING.fullmatch(code):
            override = read_override(code, options())
            allowed = choices.get(override.key)
            assert override.is_choice or not allowed or override.value in allowed, f"{name}: {code}"
        elif key_like.fullmatch(code) and Path(code).suffix not in FILE_SUFFIXES:
            assert code in known_keys(), f"{name}: {code} is no key"


@pytest.mark.parametrize("name", NAMES)
def test_every_file_and_module_named_exists(name: str) -> None:
    in_commands = [word for line in shell_lines(ROOT / name) for word in shlex.split(line, comments=True)]
    for code in {*inline_codes(ROOT / name), *in_commands}:
        if code.partition("/")[0] in TOP_FOLDERS and re.fullmatch(r"[\w./-]+", code) and code not in OF_THE_READER:
            assert (ROOT / code).exists(), f"{name}: {code}"
        elif re.fullmatch(r"mmtrain(\.\w+)+", code):
            module, _, attribute = code.rpartition(".")
            with contextlib.suppress(ModuleNotFoundError):
                if importlib.util.find_spec(code):
                    continue
            assert hasattr(importlib.import_module(module), attribute), f"{name}: {code}"


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get where it is rendered."""
    headings = re.findall(r"^#+ +(.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_every_relative_link_leads_somewhere(name: str) -> None:
    page = ROOT / name
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(file), f"{name}: {target}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    assert {page for page in pages if f"]({page})" not in index} == set()


def test_every_metric_that_is_tracked_is_described() -> None:
    """Every key that a run logs is held against the page by tests/e2e/test_smoke.py."""
    from mmtrain.track.wandb_names import SECTIONS, wandb_key

    described = {key: name for key, name in table().items() if key not in ("time", "non_finite")}
    assert {key: wandb_key(key) for key in described} == described and len(described) > 50
    assert SECTIONS.keys() <= described.keys()
    assert TrackConfig().log_every  # the key that the tutorial names


def test_the_readers_in_the_reference_read_what_is_written(tmp_path: Path) -> None:
    from mmtrain.shards import write_tokens

    vocabulary = Vocabulary(text_size=300, image_codes=64, num_sentinels=4)
    documents = [
        TokenDocument(f"d-{i}", np.arange(6, 6 + i, dtype=vocabulary.dtype), (TokenSegment("text", 0, i),), {"i": i})
        for i in range(1, 8)
    ]
    write_tokens(tmp_path, documents, vocabulary, "text", "image", shard_documents=3)

    readers: dict = {}
    for language, block in FENCE.findall((ROOT / "docs" / "reference" / "files.md").read_text()):
        if language == "python":
            exec(block, readers)
    tars = sorted(tmp_path.glob("*.tar"))
    assert len(tars) == 3
    in_order = [sample for tar in tars for sample in readers["read_in_order"](tar)]
    assert [(id, meta) for id, _, meta in in_order] == [(document.id, document.meta) for document in documents]
    for i, (document, (_, tokens, _)) in enumerate(zip(documents, in_order, strict=True)):
        np.testing.assert_array_equal(tokens, document.tokens)
        np.testing.assert_array_equal(readers["read_tokens"](tmp_path, i), document.tokens)

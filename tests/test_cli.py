"""The command line, through the real entry point."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mmtrain import cli
from mmtrain.verbs.help import CONFIGURED, HELP, VERBS

ROOT = Path(__file__).parents[1]
SLOW_IMPORTS = ("torch", "hydra", "omegaconf", "numpy", "rich", "yaml", "deepspeed", "wandb")


def run(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mmtrain", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=120)


def test_help_is_fast_and_names_every_verb() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = run("--help")
        times.append(time.perf_counter() - start)
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)
    assert min(times) < 0.5


@pytest.mark.parametrize("words", [[], *([verb] for verb in VERBS)])
def test_help_imports_nothing_slow(words: list[str]) -> None:
    code = (
        "import sys; from mmtrain.cli import main; "
        f"code = main({[*words, '--help']!r}); "
        f"slow = [name for name in {SLOW_IMPORTS!r} if name in sys.modules]; "
        "sys.exit(f'imported {slow}' if slow or code else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_teaches_with_an_example(verb: str) -> None:
    assert f"mmtrain {verb}" in HELP[verb].partition("Example")[2]


@pytest.mark.parametrize("verb", [verb for verb in CONFIGURED if verb not in ("report", "doctor", "flops")])
def test_the_settings_in_the_examples_exist(verb: str) -> None:
    from mmtrain.config.compose import compose

    examples = HELP[verb].partition("Example")[2].partition("Settings are")[0]
    lines = [line.strip() for line in examples.splitlines() if line.strip().startswith("mmtrain ")]
    assert lines
    for line in lines:
        words = [re.sub(r"^'|'$", "", word) for word in re.findall(r"'[^']*'|\S+", line)]
        compose([word for word in words if "=" in word])


def test_a_mistake_is_one_line_on_stderr_and_exit_code_2() -> None:
    done = run("train", "--cfg", "job", "model.layrs=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "mmtrain: model.layrs is not a key of the configuration; did you mean model.layers?\n"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMTRAIN_DEBUG", "1")
    done = run("ls", "modle")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_an_unknown_verb_is_answered_with_the_nearest() -> None:
    done = run("trian")
    assert (done.returncode, done.stderr) == (2, "mmtrain: 'trian' is not a verb; did you mean `mmtrain train`?\n")


@pytest.mark.parametrize("words", [["train"], ["tokenizer", "image"], ["generate"], ["flops", "count"]])
def test_cfg_job_prints_the_resolved_configuration(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words, "--cfg", "job", "experiment=smoke", "train.steps=3"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["name"], config["train"]["steps"], config["model"]["width"]) == ("smoke", 3, 32)


def test_cfg_job_of_a_run_prints_its_frozen_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmtrain.config.compose import compose, freeze

    freeze(compose(["experiment=smoke"]), tmp_path / "config.yaml")
    assert cli.main(["generate", f"run={tmp_path}", "generate.seed=5", "--cfg=job"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["name"], config["generate"]["seed"]) == ("smoke", 5)


def test_a_folder_of_your_own_is_listed_and_used(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\n# my own run\nname: mine\n")
    assert "my own run" in run("ls", "--config-dir", str(tmp_path), "experiment").stdout
    assert "name: mine\n" in run("train", "--cfg", "job", f"--config-dir={tmp_path}", "experiment=mine").stdout
    assert run("ls", "--config-dir", str(tmp_path / "nowhere")).returncode == 2


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted (SIGINT)"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl"), 2, "runs/x/metrics.jsonl"),
    ],
)
def test_what_stops_a_verb_is_one_sentence(error, code, words, monkeypatch, capsys) -> None:
    def stop(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr("mmtrain.verbs.ls.main", stop)
    assert cli.main(["ls"]) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_verb_with_all_that_it_does_at_its_end(number, monkeypatch, capsys) -> None:
    ended = []

    def work(arguments: list[str]) -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            ended.append(True)
        return 0

    monkeypatch.setattr("mmtrain.verbs.ls.main", work)
    before = signal.getsignal(number)
    assert cli.main(["ls"]) == 128 + number and ended
    assert f"interrupted ({number.name})" in capsys.readouterr().err and signal.getsignal(number) == before


def test_an_error_of_mmtrain_itself_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(arguments: list[str]) -> int:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x")

    monkeypatch.setattr("mmtrain.verbs.ls.main", stop)
    with pytest.raises(FileNotFoundError):
        cli.main(["ls"])


def test_a_reader_that_closes_the_pipe_is_no_error() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    shell = f"set -o pipefail; {sys.executable} -m mmtrain flops show cm3leon-7b | head -n 1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=environment)
    assert "Traceback" not in done.stderr and "Broken pipe" not in done.stderr


def test_flops_count_agrees_with_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    from mmtrain.config.compose import compose
    from mmtrain.models.registry import count_parameters
    from mmtrain.verbs.flops_count import vocabulary_of

    assert cli.main(["flops", "count", "experiment=smoke"]) == 0
    config = compose(["experiment=smoke"])
    parameters = count_parameters(config.model, vocabulary_of(config).size, config.stream.sequence_length)
    assert f"{parameters:,}" in capsys.readouterr().out


def test_flops_lists_and_shows_published_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["flops"]) == 0
    assert "cm3leon-7b" in capsys.readouterr().out
    assert cli.main(["flops", "show", "cm3leon-7b"]) == 0
    assert "arXiv:2309.02591" in capsys.readouterr().out
    assert cli.main(["flops", "show", "cm3leon-8b"]) == 2
    assert "did you mean cm3leon-7b" in capsys.readouterr().err


def test_doctor_says_what_fails_and_how_to_mend_it(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["doctor", "--json", f"root={tmp_path / 'runs'}", f"data_dir={tmp_path}"]
    assert cli.main(words) == 0
    findings = json.loads(capsys.readouterr().out)["checks"]
    assert {"python", "torch", "runs", "data", "deepspeed", "wandb"} <= {finding["name"] for finding in findings}
    assert not (tmp_path / "runs").exists()

    assert cli.main([*words, "track.wandb=online"]) == 1
    failed = [finding for finding in json.loads(capsys.readouterr().out)["checks"] if finding["status"] == "fail"]
    assert [finding["name"] for finding in failed] == ["wandb"]
    assert "wandb login" in failed[0]["mend"]

"""What a run leaves behind, and what can be done with it, through the real command line."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmtrain import cli
from mmtrain.config.compose import load_frozen
from mmtrain.shards import TokenShards
from mmtrain.tokens import MODALITIES, has_fast_bf16
from mmtrain.track import read_metrics
from mmtrain.train.checkpoint import newest, sealed
from mmtrain.train.plan import make_plan
from mmtrain.verbs.doctor_data import check_sources, check_vocabulary
from mmtrain.verbs.generate import shown
from mmtrain.verbs.trained import open_trained
from tests.conftest import cannot
from tests.e2e.conftest import CHECKPOINT_EVERY, PLANTED, SETTINGS, STEPS, Smoke, mmtrain
from tests.metric_table import undescribed

pytestmark = pytest.mark.slow


@pytest.fixture
def here(smoke: Smoke, monkeypatch: pytest.MonkeyPatch) -> Smoke:
    """The folder that the run was made in is the current one."""
    monkeypatch.chdir(smoke.folder)
    return smoke


def test_it_trains_without_a_network(smoke: Smoke, need_command) -> None:
    need_command("unshare")
    if not smoke.network_was_cut:
        cannot("a network namespace of its own needs root")
    assert list((smoke.run / "wandb").glob("offline-run-*"))
    assert "mmtrain sync" in smoke.output


def test_two_ranks_train_with_deepspeed_and_the_loss_falls(smoke: Smoke) -> None:
    dtype = "bf16" if has_fast_bf16(torch.device("cpu")) else "fp32"
    assert f"DeepSpeed ZeRO-1, {dtype}, 2 x cpu" in smoke.output
    rows = read_metrics(smoke.run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2
    assert rows[-1]["val_loss"] < rows[2]["val_loss"] - 0.2
    assert all(row[f"loss_{name}"] > 0 for row in rows for name in MODALITIES)
    assert undescribed(set().union(*rows)) == set(), "docs/reference/metrics.md must have every key"
    assert all(0 < row["mfu_causal"] < row["hfu"] < 1.5 for row in rows)


def test_only_the_newest_checkpoints_are_kept(smoke: Smoke) -> None:
    names = sorted(path.name for path in (smoke.run / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (STEPS - CHECKPOINT_EVERY, STEPS)]


def test_a_checkpoint_has_the_bytes_that_are_planned(smoke: Smoke) -> None:
    config = load_frozen(smoke.run / "config.yaml")
    config.plan.gpus_per_node = 2
    written = newest(smoke.run / "checkpoints")
    assert written
    vocabulary_size = written.shapes["token_embedding.weight"][0]
    assert make_plan(config, vocabulary_size).checkpoint_bytes == pytest.approx(written.num_bytes, rel=0.01)


def test_it_is_listed_shown_and_found_well(here: Smoke, capsys) -> None:
    assert cli.main(["runs", "ls", "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert (run["state"], run["step"], run["steps"], run["checkpoint_step"]) == ("finished", STEPS, STEPS, STEPS)
    assert run["val_loss"] == read_metrics(here.run / "metrics.jsonl")[-1]["val_loss"] and run["flops_total"] > 0
    assert cli.main(["runs", "show", "smoke", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["settings"]["changed"]) == {"train.steps", "train.checkpoint_every"}
    assert facts["ledger"]["train_text"] > 0 and facts["goodput"]["ratio"] > 0 and len(facts["checkpoints"]) == 2
    assert facts["wandb"]["segments"] == 1 and facts["wandb"]["is_waiting"]
    assert cli.main(["runs", "watch"]) == 0
    assert capsys.readouterr().out.endswith(f"smoke finished at step {STEPS} of {STEPS}\n")
    config = load_frozen(here.run / "config.yaml")
    found = [*check_sources(config), *check_vocabulary(config)]
    assert [finding.status for finding in found] == ["pass", "pass"], found


def test_the_run_directory_tells_how_it_was_made(smoke: Smoke) -> None:
    facts = json.loads((smoke.run / "environment.json").read_text())
    assert facts["command"] == " ".join(["mmtrain", "train", *SETTINGS])
    assert facts["packages"]["torch"]
    assert "steps: 60" in (smoke.run / "config.yaml").read_text()


def test_no_secret_of_the_environment_is_in_any_file(smoke: Smoke) -> None:
    files = [path for path in smoke.folder.rglob("*") if path.is_file()]
    assert len(files) > 30 and not [path for path in files if PLANTED.encode() in path.read_bytes()]
    assert PLANTED not in smoke.output


def test_plain_webdataset_reads_the_shards(smoke: Smoke) -> None:
    import webdataset

    (shard,) = smoke.folder.glob("data/shapes/documents-*/train/shard-000000.tar")
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode("rgb8"))
    assert len(samples) == 64
    assert all(sample["0.png"].shape == (32, 32, 3) and sample["json"]["texts"][0] for sample in samples)
    (shard,) = smoke.folder.glob("data/shapes/tokens-*/train/shard-000000.tar")
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode())
    assert len(samples) == 64 and all(sample["npy"].ndim == 1 for sample in samples)


def test_another_configuration_under_the_same_name_is_refused(here: Smoke, capsys) -> None:
    frozen = (here.run / "config.yaml").read_text()
    assert cli.main(["train", *SETTINGS, "model.layers=3"]) == 2
    assert "holds a run with model.layers=2, this command says 3" in capsys.readouterr().err
    assert (here.run / "config.yaml").read_text() == frozen


def test_a_batch_that_cannot_be_shared_is_refused_before_any_work(here: Smoke, capsys) -> None:
    assert cli.main(["train", *SETTINGS, "name=odd", "stream.global_batch=5"]) == 2
    assert "stream.global_batch=5 does not divide into 2 ranks" in capsys.readouterr().err
    assert not (here.folder / "runs" / "odd").exists()


def test_generate_draws_pictures_of_the_right_size_and_the_same_ones_again(here: Smoke) -> None:
    words = ["generate", "generate.prompts=[a red circle,two squares]", "generate.num_samples=2"]
    for out in ("one", "two"):
        assert cli.main([*words, f"generate.out={out}"]) == 0
    record = json.loads(Path("one/samples.json").read_text())
    assert record["checkpoint"] == f"smoke/step-{STEPS:08d}"
    assert [sample["prompt"] for sample in record["samples"]] == ["a red circle"] * 2 + ["two squares"] * 2
    for sample in record["samples"]:
        pixels = np.asarray(Image.open(Path("one", sample["file"])))
        assert pixels.shape == (32, 32, 3)
        assert np.array_equal(pixels, np.asarray(Image.open(Path("two", sample["file"]))))
    assert Path("one/grid.png").is_file()


def test_generate_captions_a_picture_file(here: Smoke, capsys) -> None:
    Image.new("RGB", (50, 40), "red").save("mine.png")
    words = ["generate", "generate.task=caption", "generate.num_samples=1", "generate.out=said"]
    assert cli.main([*words, "generate.prompts=[mine.png]"]) == 0
    (sample,) = json.loads(Path("said/samples.json").read_text())["samples"]
    assert sample["prompt"] == "mine.png"
    assert f"mine.png: {shown(sample['text'])}" in capsys.readouterr().out

    Path("text.png").write_text("no picture")
    for name in ("text.png", "missing.png"):
        assert cli.main([*words, f"generate.prompts=[{name}]"]) == 2
        assert f"picture {name} cannot be read" in capsys.readouterr().err


def test_generate_names_what_is_wrong_with_a_prompt(here: Smoke, capsys) -> None:
    assert cli.main(["generate", "generate.prompts=['  ']"]) == 2
    assert "prompt 1 is empty" in capsys.readouterr().err
    assert cli.main(["generate", f"generate.prompts=[{'very long ' * 100}]"]) == 2
    assert "exceed the model's 128 positions" in capsys.readouterr().err
    assert cli.main(["generate", "generate.checkpoint=step-00000007"]) == 2
    assert "step-00000007" in capsys.readouterr().err


def test_sampling_and_evaluation_are_booked(here: Smoke) -> None:
    def books() -> dict[str, int]:
        return json.loads((here.run / "ledger.json").read_text())["flops"]

    before = books()
    assert cli.main(["generate", "generate.prompts=[a]", "generate.num_samples=1", "generate.out=booked"]) == 0
    assert cli.main(["evaluate", "task=loss"]) == 0
    after = books()
    grown = {kind for kind in after if after[kind] > before[kind]}
    assert grown == {"sampling", "evaluation"}


def test_evaluate_loss_agrees_with_the_validation_of_the_training(here: Smoke) -> None:
    assert cli.main(["evaluate", "task=loss"]) == 0
    found = json.loads((here.run / "evaluation-loss.json").read_text())
    row = read_metrics(here.run / "metrics.jsonl")[-1]
    assert all(abs(found[name] - row[f"val_loss_{name}"]) < 0.01 for name in MODALITIES)
    documents, run = found["documents"], open_trained(["run=runs/smoke"])
    tokens = TokenShards(run.artifacts.tokens[run.artifacts.main] / "validation")
    kinds = [run.vocabulary.modality(tokens.tokens(i).astype(np.int64)) for i in range(len(tokens))]
    assert documents["ids"] == [tokens.id(i) for i in range(len(tokens))]
    for way in ("both", "text", "image"):
        # All text and image tokens of the document, and none of what stands before it.
        assert [row[1:] for row in documents[way]["targets"]] == [[int((k == m).sum()) for m in (1, 2)] for k in kinds]
        assert sum(documents[way]["retrieved"]) > 0


def test_evaluate_shapes_grades_every_picture_and_caption(here: Smoke) -> None:
    few = [f"task.num_{what}=4" for what in ("prompts", "captions", "infills")]
    assert cli.main(["evaluate", "task=shapes", *few]) == 0
    results = json.loads((here.run / "evaluation-shapes.json").read_text())
    pictures = results["results"]["pictures"]
    assert pictures["background"]["total"] == 4
    apart = [results["results"][f"pictures with {kind} combinations"].get("count") for kind in ("seen", "unseen")]
    assert sum(count["right"] for count in apart if count) == pictures["count"]["right"]
    assert sum(count["total"] for count in apart if count) == 4
    assert all(p["low"] <= p["share"] <= p["high"] for shares in results["results"].values() for p in shares.values())
    assert len(results["captions"]) == 4
    assert results["results"]["masked words, filled in"]["all"]["total"] == len(results["infilled"]) == 4


def test_curves_of_guidance_are_measured_and_drawn(here: Smoke) -> None:
    few = ["task.num_prompts=3", "task.guidance_weights=[1,2.5]", "task.contrastive_ks=[1,3]"]
    assert cli.main(["evaluate", "task=curves", *few]) == 0
    weights, ks = json.loads((here.run / "evaluation-curves.json").read_text())["results"].values()
    assert list(weights) == ["1.0", "2.5"] and list(ks) == ["1.0", "3.0"]
    assert all(point["count"]["total"] == 3 for point in [*weights.values(), *ks.values()])
    assert (here.run / "curves.svg").read_bytes().startswith(b"<?xml")


def test_the_report_is_one_page_that_needs_nothing_else(here: Smoke) -> None:
    assert cli.main(["report", "generate.num_samples=1"]) == 0
    page = (here.run / "report.html").read_text()
    assert page.count("data:image/png;base64,") > 10
    loads = r"""(?:src|srcset)\s*=\s*["']?(?!data:)[^"'> ]+|<link[^>]*>|@import|url\((?!["']?data:)"""
    assert re.findall(loads, page) == []
    assert "mmtrain train experiment=smoke" in page


def test_a_checkpoint_of_another_vocabulary_is_refused(here: Smoke, capsys) -> None:
    copy = here.folder / "runs" / "foreign"
    shutil.copytree(here.run, copy)
    state = copy / "checkpoints" / f"step-{STEPS:08d}" / "state.json"
    text = state.read_text()
    state.write_text(re.sub(r'("vocabulary": ")[0-9a-f]{12}(", "model")', r"\g<1>000000000000\2", text))
    # A checkpoint of another run, whole in itself: its manifest fits.
    manifest = state.with_name("MANIFEST.json")
    content = json.loads(manifest.read_text())
    content["files"]["state.json"] = {
        "bytes": state.stat().st_size,
        "sha256": hashlib.sha256(state.read_bytes()).hexdigest(),
    }
    manifest.write_text(json.dumps(sealed(content)))
    assert text != state.read_text()
    assert cli.main(["generate", "run=runs/foreign", "generate.prompts=[a]"]) == 2
    assert "another vocabulary" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence_and_leaves_the_run_as_it_was(smoke: Smoke) -> None:
    """A real limit on the size of files: every checkpoint fails and is said, the last one ends the run."""
    limit = ("prlimit", "--fsize=100000")
    words = ("train", *SETTINGS, "name=full", "engine.ranks=1", "track.wandb=disabled")
    done = mmtrain(*words, cwd=smoke.folder, before=limit)
    assert done.returncode == 2, done.stderr
    sentences = [line for line in done.stderr.splitlines() if line.startswith("mmtrain: ")]
    assert "Traceback" not in done.stderr
    assert len(sentences) == 2 and "checkpoint" in sentences[0]
    assert list((smoke.folder / "runs" / "full" / "checkpoints").glob("[!.]*")) == []

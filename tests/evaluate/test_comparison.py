"""Comparisons of run directories in the format that training and evaluation write."""

import hashlib
import json
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmtrain.config import Config, UserError
from mmtrain.config.compose import compose, freeze
from mmtrain.evaluate.compared import DIFFUSION, TOKENS, ComparedRun, read_run
from mmtrain.evaluate.comparison import Comparison, compare_runs
from mmtrain.evaluate.distances import EXTRACTOR
from mmtrain.evaluate.scaling import Estimate
from mmtrain.flops import Ledger
from mmtrain.train.checkpoint import FORMAT_VERSION, MANIFEST, STATE, sealed, tensors_name
from mmtrain.verbs import report

PROMPTS, BUDGETS = 40, (3e11, 1e12, 3e12)
FACTS = ("background", "colors", "count", "shapes")


@pytest.fixture(scope="module")
def base() -> Config:
    return replace(compose(["experiment=smoke", "retrieval=none"]), root="runs")


def write_run(folder: Path, base: Config, family: str, width: int, seed: int, flops: float, share: float) -> Path:
    """A trained and evaluated run: `share` of the facts right, KID 1 - share."""
    rng = np.random.default_rng([family == DIFFUSION, width, seed, int(flops)])
    model = replace(base.model, family="dit" if family == DIFFUSION else "llama", width=width)
    config = replace(base, name=folder.name, seed=seed, model=model)
    folder.mkdir(parents=True)
    freeze(config, folder / "config.yaml")
    checkpoint = folder / "checkpoints" / f"step-{config.train.steps:08d}"
    checkpoint.mkdir(parents=True)
    files = {}
    for name, content in ((STATE, json.dumps({"step": config.train.steps}).encode()), (tensors_name(0, 1), b"x")):
        (checkpoint / name).write_bytes(content)
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"format_version": FORMAT_VERSION, "step": config.train.steps, "time": 0.0, "permanent": False}
    manifest |= {"shapes": {"w": [width, 1000]}, "files": files}
    (checkpoint / MANIFEST).write_text(json.dumps(sealed(manifest)))
    ledger = Ledger()
    ledger.book("train_text", int(flops))
    ledger.book("image_tokenizer_train", 10**12)
    ledger.save(folder / "ledger.json")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 6, "time": 0.0, "val_loss": 3.0 - share}) + "\n")
    drawn = [
        {"prompt": f"{i} things", "facts": {name: bool(rng.random() < share) for name in FACTS}} for i in range(PROMPTS)
    ]
    blocks = (1 - share + rng.normal(0, 0.02, 10)).tolist()
    distance = {"extractor": EXTRACTOR, "num_pictures": PROMPTS, "kid": 1 - share, "kid_error": 0.01, "frechet": None}
    record = {
        "task": asdict(config.task),
        "checkpoint": checkpoint.name,
        "results": {"ceiling: true pictures": {"colors": {"right": 39, "total": 40, "share": 0.975}}},
        "distances": {"drawn pictures": distance | {"blocks": blocks}, "true": distance | {"blocks": [0.01] * 10}},
        "drawn": drawn,
    }
    (folder / "evaluation-shapes.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, base: Config) -> Path:
    """Token models have 35, 60, 80 % of the facts right (the larger of two sizes fewer), diffusion models 55 %."""
    root = tmp_path_factory.mktemp("sweep") / "study"
    for family, shares in ((TOKENS, (0.35, 0.6, 0.8)), (DIFFUSION, (0.55, 0.55, 0.55))):
        for number, (flops, share) in enumerate(zip(BUDGETS, shares, strict=True)):
            for width in (64, 128) if family == TOKENS else (64,):
                for seed in (0, 1):
                    name = f"{family.split()[0]}-{width}-{seed}-{number}"
                    write_run(root / name, base, family, width, seed, flops, share - 0.1 * (width == 128))
    return root


@pytest.fixture(scope="module")
def runs(sweep: Path) -> dict[str, ComparedRun]:
    """Those of one size, by name."""
    found = {folder.name: read_run(folder) for folder in sweep.glob("*-64-*")}
    return {name: run for name, run in found.items() if isinstance(run, ComparedRun)}


def some(runs: dict[str, ComparedRun], *names: str) -> Comparison:
    """Of the runs whose names match a pattern."""
    return compare_runs([runs[name] for name in sorted(runs) if any(fnmatch(name, pattern) for pattern in names)])


def test_the_page_says_who_is_ahead_and_where_the_curves_cross(sweep, capsys):
    assert report.main(["compare", str(sweep)]) == 0
    said = capsys.readouterr().out
    assert "at 3.0e11 FLOPs diffusion models are ahead" in said and "at 3.0e12 FLOPs token models are ahead" in said
    assert f"By KID ({EXTRACTOR}) at 3.0e11 FLOPs diffusion models are ahead" in said
    assert "The most accurate of the token models at 3.0e11 and 1.0e12 and 3.0e12 FLOPs is the smallest" in said
    folder = sweep / "comparison"
    page, numbers = (folder / "comparison.html").read_text(), json.loads((folder / "comparison.json").read_text())
    assert "http" not in page.replace("http-equiv", "") and f"KID ({EXTRACTOR})" in page
    for name in ("quality.png", "published.png", "hours.png"):
        with Image.open(folder / name) as picture:
            assert picture.format == "PNG" and picture.width > 1000
    accuracy = numbers["measures"]["attribute accuracy"]
    crossing = accuracy["crossing"]["flops"]
    assert crossing["low"] < crossing["value"] < crossing["high"] and 3e11 < crossing["value"] < 1.2e12
    assert accuracy["best"] == {family: dict.fromkeys("012", "0.064 M") for family in (DIFFUSION, TOKENS)}
    assert len(numbers["runs"]) == 18 and numbers["left_out"] == {} and numbers["sentences"][0] in said
    assert numbers["runs"][0]["spent_flops"] == numbers["runs"][0]["training_flops"] + 10**12


def test_numbers_survive_the_file(runs):
    found = some(runs, "*")
    plain = json.loads(json.dumps(found.to_dict()))
    for measure in found.measures:
        read = plain["measures"][measure.name]
        assert [Estimate(**cell["quality"]) for cell in read["cells"]] == [c.quality for c in measure.scaling.cells]
        assert {int(b): Estimate(**d) for b, d in read["differences"].items()} == measure.scaling.differences
        assert Estimate(**read["fits"][TOKENS]["slope"]) == measure.scaling.fits[TOKENS].slope


def test_one_budget_one_family_and_one_seed_are_said_in_a_sentence(runs):
    def says(*names: str) -> str:
        return " ".join(some(runs, *names).sentences)

    assert "a single budget" in says("*-0")
    assert "nothing to say about diffusion models" in says("token-*")
    assert "one seed" in says("token-64-0-1", "diffusion-64-0-1")
    assert "no budget has runs of both" in says("token-64-0-1", "diffusion-64-0-2")


def test_what_was_not_evaluated_is_left_out_with_its_reason(tmp_path, base, capsys):
    for number in range(2):
        write_run(tmp_path / f"run{number}", base, TOKENS, 64, number, 1e12, 0.5)
    (tmp_path / "run1" / "evaluation-shapes.json").unlink()
    assert report.main(["compare", str(tmp_path / "run0"), str(tmp_path / "run1"), f"out={tmp_path}/here"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "run1 was not evaluated: `mmtrain evaluate run=" in said and (tmp_path / "here/comparison.html").exists()
    with pytest.raises(UserError, match="nothing can be compared"):
        report.main(["compare", str(tmp_path / "run1")])


def test_mistakes_are_one_sentence(tmp_path, base):
    with pytest.raises(UserError, match="neither a run directory nor a folder of them"):
        report.main(["compare", str(tmp_path)])
    with pytest.raises(UserError, match="give the runs to compare"):
        report.main(["compare"])
    one, two = (write_run(tmp_path / name, base, TOKENS, 64, 0, 1e12, 0.5) for name in ("one", "two"))
    path = two / "evaluation-shapes.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"drawn": record["drawn"][:10]}))
    with pytest.raises(UserError, match="drew other captions"):
        report.main(["compare", str(one), str(two)])
    path.write_text(json.dumps(record | {"drawn": 3}))
    with pytest.raises(UserError, match="damaged"):
        read_run(two)


def test_settings_other_than_size_are_named(tmp_path, base):
    fast = replace(base, optim=replace(base.optim, lr=0.5))
    folders = [write_run(tmp_path / name, c, TOKENS, 64, 0, 1e12, 0.5) for name, c in (("a", base), ("b", fast))]
    found = [read_run(folder) for folder in folders]
    settings = compare_runs([run for run in found if isinstance(run, ComparedRun)]).settings
    assert settings == ("0.064 M, optim.lr=0.001", "0.064 M, optim.lr=0.5")

"""A real search: killed in a trial, gone on with by the same command, its books those of the runs' own ledgers."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmtrain.flops import Ledger
from mmtrain.track import read_metrics
from mmtrain.verbs.report_scaling import read_point
from tests.e2e.conftest import Smoke, environment, mmtrain
from tests.e2e.test_recovery import kill_all

pytestmark = pytest.mark.slow
STEPS = 200  # so that the second trial still trains when its first validation losses are read
WORDS = ["sweep", "experiment=smoke", "name=found", "engine=ddp", "engine.ranks=1", "track.wandb=disabled"]
WORDS += [f"train.steps={STEPS}", "train.evaluate_every=10", "optim.warmup_steps=10", "track.log_every=1"]
# The first trial trains, the second cannot: the grid begins with the learning rate that does.
WORDS += ["sweep.sampler=grid", "sweep.space={optim.lr:[0.01,1.0e-9]}", "health.signs=false"]


def test_a_killed_search_goes_on_and_prunes_what_does_not_learn(smoke: Smoke, tmp_path: Path) -> None:
    shutil.copytree(smoke.folder / "data", tmp_path / "data")
    folder = tmp_path / "runs" / "found"
    first = folder / "trial-0000"
    process = subprocess.Popen(
        [sys.executable, "-m", "mmtrain", *WORDS], cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL
    )
    try:
        while not read_metrics(first / "metrics.jsonl"):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        kill_all(process)
    done = mmtrain(*WORDS, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((folder / "search.json").read_text())
    good, bad = record["trials"]
    assert (good["state"], bad["state"], record["best"]) == ("complete", "pruned", "trial-0000")
    for trial in (good, bad):
        run = folder / trial["name"]
        ledger, rows = Ledger.read(run / "ledger.json"), read_metrics(run / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and ledger["repeated"] == 0
        assert trial["flops"]["training"] == ledger.training_total == rows[-1]["flops_total"]
    assert good["flops"]["training"] == good["flops"]["without_pruning"]
    assert bad["flops"]["training"] < bad["flops"]["without_pruning"]
    assert (first / "attempts.jsonl").read_text().count('"start"') == 2
    point = read_point(first)
    assert not isinstance(point, str)
    assert point.flops == good["flops"]["training"] and 5.9 < point.flops / (point.parameters * point.tokens) < 9
    too_few = mmtrain("report", "scaling", "runs/found", cwd=tmp_path)
    assert too_few.returncode == 2 and "are too few for L(N, D)" in too_few.stderr

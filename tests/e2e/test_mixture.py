"""Two corpora in one run: shares that change with the step, batches from processes, through the command line."""

from pathlib import Path

import pytest

from mmtrain.track import read_metrics
from tests.e2e.conftest import mmtrain

pytestmark = pytest.mark.slow


def test_a_mixture_trains_and_says_what_it_delivered(tmp_path: Path) -> None:
    (tmp_path / "my_conf" / "corpus").mkdir(parents=True)
    (tmp_path / "my_conf" / "corpus" / "more.yaml").write_text(
        "# other scenes\nname: more\nkind: shapes\nseed: 5\nnum_documents: 40\nnum_validation: 8\n"
    )
    words = ["--config-dir", "my_conf", "experiment=smoke", "mix={shapes:{0:1,12:0},more:{0:0,12:1}}"]
    words += ["image_tokenizer.steps=2", "stream.workers=1", "stream.lookahead=2", "track.wandb=disabled"]
    done = mmtrain("train", *words, "train.steps=12", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "runs" / "smoke" / "metrics.jsonl")
    assert rows[0]["data/shapes/share"] == 1.0 and rows[-1]["data/more/share"] > 0.5
    assert all(row["data/shapes/share"] + row["data/more/share"] == pytest.approx(1) for row in rows)
    for row in rows:
        kinds = [row[f"data/{name}/{kind}"] for name in ("shapes", "more") for kind in ("text", "image", "special")]
        retrieved = row["data/shapes/retrieved"] + row["data/more/retrieved"]
        before = rows[rows.index(row) - 1]["tokens"] if row is not rows[0] else 0
        assert sum(kinds) + retrieved == row["tokens"] - before
    taken = [row["data/shapes/epochs"] for row in rows]
    assert taken == sorted(taken) and taken[0] > 0

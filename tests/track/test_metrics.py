"""metrics.jsonl: append-only, honest about NaN, readable after crashes and resumes."""

import json

import numpy as np

from mmtrain.track.metrics import MetricsWriter, read_metrics


def write(path, *rows):
    writer = MetricsWriter(path)
    for row in rows:
        writer.write(row)
    writer.close()


def test_rows_are_on_disk_at_once_and_plain_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write({"step": 1, "loss": np.float32(0.5), "tokens": np.int64(7)})
    row = json.loads(path.read_text())  # still open
    assert (row["loss"], row["tokens"]) == (0.5, 7) and row["time"] > 0


def test_nan_and_infinity_become_null_with_a_note(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, {"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1})
    assert "NaN" not in path.read_text()
    row = read_metrics(path)[0]
    assert (row["loss"], row["grad_norm"], row["lr"]) == (None, None, 0.1)
    assert row["non_finite"] == {"loss": "nan", "grad_norm": "inf"}


def test_a_later_segment_replaces_what_the_dead_one_did_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, *({"step": step, "loss": 1.0} for step in (10, 20, 30, 40)))
    write(path, {"step": 25, "loss": 2.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(10, 1.0), (20, 1.0), (25, 2.0)]
    assert len(path.read_text().splitlines()) == 5  # nothing was deleted


def test_rows_of_one_step_are_merged_and_the_later_wins(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, {"step": 5, "loss": 1.0}, {"step": 5, "val_loss": 3.0}, {"step": 5, "loss": 2.0})
    rows = read_metrics(path)
    assert len(rows) == 1 and (rows[0]["loss"], rows[0]["val_loss"]) == (2.0, 3.0)


def test_a_cut_last_line_costs_only_itself(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0})
    path.write_bytes(path.read_bytes()[:-9])
    assert [row["step"] for row in read_metrics(path)] == [1]
    write(path, {"step": 2, "loss": 5.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(1, 1.0), (2, 5.0)]


def test_no_file_and_foreign_lines_are_no_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_bytes(b'\xff\xfe\n[1]\n"text"\n{"loss": 1}\n{"step": "x"}\nnull\n')
    assert read_metrics(path) == []

"""The comparison with published models."""

from PIL import Image

from mmtrain.flops.compare import OwnRun, comparison_figure, compute_table


def test_table_is_sorted_and_relative_to_our_run():
    rows = compute_table([OwnRun("ours", 2 * 10**15)])
    assert [row.flops for row in rows] == sorted(row.flops for row in rows)
    assert [row.ratio for row in rows if row.own] == [1.0]
    ratios = {row.name: row.ratio for row in rows}
    assert ratios["CM3leon-7B"] == 1.043e23 / 2e15
    assert not any("from memory" in row.fid_note for row in rows)
    assert not any("Stable Diffusion 3" in name or "Make-A-Scene" in name for name in ratios)


def test_table_gives_no_fid_to_our_run_and_marks_bounds():
    rows = {row.name: row for row in compute_table([OwnRun("ours", 10**15)])}
    assert rows["ours"].fid is None
    assert rows["RA-CM3 2.7B"].reservation == "upper bound"


def test_table_without_spent_compute_has_no_ratios():
    assert all(row.ratio is None for row in compute_table([OwnRun("ours", 0)]))


def test_figure_is_a_png_for_no_one_and_several_runs(tmp_path):
    for runs in ([], [OwnRun("a", 3 * 10**15)], [OwnRun("a", 3 * 10**15), OwnRun("b", 10**23)], [OwnRun("a", 0)]):
        with Image.open(comparison_figure(runs, tmp_path / "figure.png")) as picture:
            assert picture.format == "PNG" and picture.width > 1000

"""Published hours beside counted FLOPs."""

import pytest
from PIL import Image

from mmtrain.flops import hours_figure, hours_table
from mmtrain.flops.hours import reference_hours


def test_implied_utilization_of_published_hours_and_its_flags():
    rows = {row.name: row for row in hours_table()}
    assert rows["Chameleon-7B"].mfu == pytest.approx(0.402, abs=5e-4) and rows["Chameleon-7B"].flag == ""
    assert rows["Stable Diffusion v1.5"].mfu == pytest.approx(0.040, abs=5e-4)
    assert rows["Stable Diffusion v1.5"].flag == rows["DALL-E 2"].flag == "below 5 %"
    assert reference_hours(0.40 * 312e12 * 3600) == pytest.approx(1.0)


def test_nothing_is_counted_from_hours_and_no_hours_are_from_memory():
    rows = {row.name: row for row in hours_table()}
    assert rows["PixArt-alpha XL/2"].counted is None and rows["PixArt-alpha XL/2"].mfu is None
    assert rows["MicroDiT-XL/2"].counted is None  # its bound is hours at full peak
    assert rows["RA-CM3 2.7B"].published is None  # 256 GPUs for 5 days are from memory


def test_the_figure_is_a_png(tmp_path):
    with Image.open(hours_figure(tmp_path / "hours.png", [3e12])) as picture:
        assert picture.format == "PNG" and picture.width > 1000

"""The pictures of docs/explanation/objective.md show what the objective builds today."""

import runpy
from pathlib import Path

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def test_the_pictures_of_the_objective_are_up_to_date():
    pictures = runpy.run_path(str(IMAGES / "draw_objective.py"))["pictures"]()
    page = (IMAGES.parent / "explanation" / "objective.md").read_text()
    for name, picture in pictures.items():
        assert (IMAGES / name).read_text() == picture, f"{name} is old: run python docs/images/draw_objective.py"
        assert f"(../images/{name})" in page

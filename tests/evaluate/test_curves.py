"""The figure of guidance: the same numbers give the same file, and every fact is in it."""

from mmtrain.evaluate import Curve, draw_curves, wilson

FACTS = ("background", "count", "colors", "relations", "shapes", "sizes")


def test_a_figure_has_a_panel_per_curve_and_depends_on_the_numbers_alone() -> None:
    def curves(right: int) -> list[Curve]:
        points = {weight: {fact: wilson(right, 500) for fact in FACTS} for weight in (1.0, 2.0, 4.0)}
        return [Curve("guidance weight", points), Curve("k of CD-K", points)]

    figure = draw_curves(curves(400), "500 captions")
    assert figure == draw_curves(curves(400), "500 captions") != draw_curves(curves(100), "500 captions")
    assert figure.count(b'id="axes_') == 2

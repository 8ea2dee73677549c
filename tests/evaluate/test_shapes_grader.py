"""The grader reads true scenes right, also blurred ones, and catches planted faults."""

from collections import Counter
from dataclasses import replace

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest

from mmtrain.documents import decode_square
from mmtrain.documents.scene import BACKGROUNDS, Scene, Thing
from mmtrain.documents.shapes import draw_scene, make_document, parse_caption
from mmtrain.evaluate.shapes_grader import compare, grade

TRUTH = Scene(
    "white",
    (Thing("red", "circle", "large", 0.3, 0.3), Thing("blue", "star", "small", 0.75, 0.4)),
    ((0, "left of", 1),),
    2,
)


def blurred(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a coarse tokenizer does, and worse."""
    soft = np.asarray(PIL.Image.fromarray(pixels).filter(PIL.ImageFilter.GaussianBlur(1)), dtype=np.float64)
    return np.clip(soft + rng.normal(0, 8, soft.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("damage", [False, True])
def test_at_least_99_percent_of_true_scenes_are_read_right(damage):
    rng, right, total = np.random.default_rng(0), Counter(), 150
    for index in range(total):
        document = make_document(3, "validation", index)
        pixels = decode_square(document.images[0].data, 64)
        facts = grade(blurred(pixels, rng) if damage else pixels)
        right.update(name for name, holds in compare(facts, Scene.from_json(document.meta["scene"])).items() if holds)
        right.update(
            f"prompt {name}" for name, holds in compare(facts, parse_caption(document.texts[0])).items() if holds
        )
    assert len(right) == 12
    assert min(right.values()) >= 0.99 * total, right


def faults(shown: Scene) -> set[str]:
    return {name for name, holds in compare(grade(draw_scene(shown, 64)), TRUTH).items() if not holds}


def test_true_scene_has_no_fault():
    assert faults(TRUTH) == set()


def test_changed_color_is_caught():
    first, second = TRUTH.objects
    assert faults(replace(TRUTH, objects=(replace(first, color="pink"), second))) >= {"colors", "shapes"}


def test_changed_shape_is_caught():
    first, second = TRUTH.objects
    assert faults(replace(TRUTH, objects=(replace(first, shape="square"), second))) == {"shapes"}


def test_changed_size_is_caught():
    first, second = TRUTH.objects
    assert faults(replace(TRUTH, objects=(replace(first, size="small"), second))) == {"sizes"}


def test_swapped_places_are_caught():
    first, second = TRUTH.objects
    swapped = (replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y))
    assert faults(replace(TRUTH, objects=swapped)) == {"relations"}


def test_exchanged_shapes_are_not_right_although_both_are_there():
    first, second = TRUTH.objects
    assert "shapes" in faults(replace(TRUTH, objects=(replace(first, shape="star"), replace(second, shape="circle"))))


def test_removed_and_added_objects_are_caught():
    extra = Thing("green", "ring", "large", 0.3, 0.75)
    assert {"count", "colors", "shapes", "relations"} <= faults(replace(TRUTH, objects=TRUTH.objects[:1]))
    assert faults(replace(TRUTH, objects=(*TRUTH.objects, extra))) == {"count", "colors", "shapes"}


@pytest.mark.parametrize("background", sorted(set(BACKGROUNDS) - {"white"}))
def test_changed_background_is_caught(background):
    assert faults(replace(TRUTH, background=background)) == {"background"}


def test_touching_objects_of_two_colors_are_two():
    touching = (Thing("red", "square", "small", 0.35, 0.5), Thing("blue", "square", "small", 0.63, 0.5))
    facts = grade(draw_scene(replace(TRUTH, objects=touching), 64))
    assert {(thing.color, thing.shape) for thing in facts.objects} == {("red", "square"), ("blue", "square")}


def test_specks_are_no_objects():
    pixels = draw_scene(TRUTH, 64)
    pixels[55:58, 10:13] = (0, 150, 0)
    assert all(compare(grade(pixels), TRUTH).values())


def test_noise_is_no_scene():
    facts = grade(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8))
    assert not compare(facts, TRUTH)["colors"] and not compare(facts, TRUTH)["shapes"]


def test_caption_is_compared_with_the_truth():
    right = parse_caption("a red circle to the left of a blue star on a white background")
    wrong = parse_caption("three shapes on white: a red circle right of a green star")
    assert all(compare(right, TRUTH).values())
    verdict = compare(wrong, TRUTH)
    assert verdict["background"] and not any(verdict[name] for name in ("count", "colors", "shapes", "relations"))
    assert not any(compare(parse_caption("blah"), TRUTH).values())

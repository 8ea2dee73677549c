"""What a picture shows, from its pixels alone: background, objects with color, shape, size and place.

No ground truth and no model is used, so that generated pictures are graded as drawn ones are. Made for pictures
that went through a coarse tokenizer: blurred edges, noise, colors a little off, specks.

Legend: S side in pixels, P foreground pixels of one object, G side of the normalized mask, K templates.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import PIL.Image
import PIL.ImageFilter

from mmtrain.documents.scene import BACKGROUNDS, COLORS, SHAPES, Scene, Thing, relation_between
from mmtrain.documents.shapes import RADII, draw_mask

__all__ = ["compare", "grade"]

PALETTE_NAMES = (*BACKGROUNDS, *COLORS)
PALETTE = np.array([*BACKGROUNDS.values(), *COLORS.values()], dtype=np.float32)
COLOR_NAMES = tuple(COLORS)
COLOR_VALUES = np.array(list(COLORS.values()), dtype=np.float32)

# Closest object color to any background: beige and pink, 118. A pixel is foreground when it is more than a
# third of the way from the background to the nearest object color.
FOREGROUND_DISTANCE = 45.0
# A shade farther from a palette color (or from the way there from the background) does not bear its name.
LARGEST_MISTINT = 60.0
# The smallest true object (a small star) covers 2 % of the picture; generated specks are far smaller.
MIN_AREA = 0.006
# A second color in one component is another object when it explains so much better (squared RGB distance) ...
SECOND_COLOR_GAIN = 30.0**2
# ... this share of the picture. The fringe where two colors mix has next to no inner pixels.
MIN_SOLID = 0.002
# Objects end where their coverage falls below this share of its peak, so blur does not join neighbours.
EDGE = 0.4
GRID = 24
# Half the window around an object, in square roots of its area: contains each shape whole, with its blur.
WINDOW = 1.15
TEMPLATE_RADII = (6.0, 8.5, 12.0)
TEMPLATE_BLURS = (0.0, 1.0, 1.8)
# Best overlap of anything true, also blurred, is above 0.75; a shapeless blob is a circle at best.
MIN_OVERLAP = 0.5


def _components(mask: np.ndarray) -> Iterator[np.ndarray]:
    """The 4-connected parts of a boolean (S, S) mask, each as a boolean mask of the same size."""
    side_y, side_x = mask.shape
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # the largest label of each part floods it: as many rounds as the part is long
        padded = np.pad(labels, 1)
        neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
        flooded = np.where(mask, np.maximum.reduce([labels, *neighbours]), 0)
        if np.array_equal(flooded, labels):
            break
        labels = flooded
    for label in np.unique(labels[labels > 0]):
        yield labels == label


def _nearest(pixels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Index of the nearest palette color for each of (N, 3) pixels."""
    return ((pixels[:, None, :] - palette[None]) ** 2).sum(axis=-1).argmin(axis=1)


def _unmix(pixels: np.ndarray, backdrop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Explain every pixel as a mixture of the background and each object color C.

    Returns coverage (S, S, C) in 0..1 and the squared distance (S, S, C) that the best mixture leaves. Red on
    white fades through pinkish shades, but they are mixtures of red, not of pink.
    """
    ways_C3 = COLOR_VALUES - backdrop
    offsets = pixels - backdrop
    coverage = np.clip(offsets @ (ways_C3 / np.maximum((ways_C3**2).sum(axis=1, keepdims=True), 1.0)).T, 0, 1)
    residual = ((offsets[:, :, None, :] - coverage[..., None] * ways_C3) ** 2).sum(axis=-1)
    return coverage, residual


def _background(pixels: np.ndarray) -> tuple[str | None, np.ndarray]:
    """Name and actual shade (3,) of the color that most of the border has, where no object of ours ever lies.

    The shade and not the palette's: a tokenizer may be a little off over the whole picture. No name when that
    is no background color.
    """
    width = max(1, len(pixels) // 32)
    border = np.ones(pixels.shape[:2], dtype=bool)
    border[width:-width, width:-width] = False
    nearest = _nearest(pixels[border], PALETTE)
    index = int(np.bincount(nearest).argmax())
    shade = np.median(pixels[border][nearest == index], axis=0)
    known = index < len(BACKGROUNDS) and np.linalg.norm(shade - PALETTE[index]) < LARGEST_MISTINT
    return (PALETTE_NAMES[index] if known else None), shade


def _inner_area(mask: np.ndarray) -> int:
    """Number of pixels of `mask` whose 4 neighbours are all in it."""
    padded = np.pad(mask, 1)
    return int((mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]).sum())


def _objects_in(part: np.ndarray, coverage: np.ndarray, residual: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(color index, mask) of each object in one component: more than one where blur or a fault joins them."""
    owners = [int(residual[part].sum(axis=0).argmin())]
    while len(owners) < len(COLORS):
        explained = residual[..., owners].min(axis=-1)
        gains = [part & (explained - residual[..., color] > SECOND_COLOR_GAIN) for color in range(len(COLORS))]
        areas = [_inner_area(gain & (coverage[..., color] > EDGE)) for color, gain in enumerate(gains)]
        if max(areas) < MIN_SOLID * part.size:
            break
        owners.append(int(np.argmax(areas)))
    nearest = residual[..., owners].argmin(axis=-1)
    found = []
    for number, color in enumerate(owners):
        own = part & (nearest == number)
        if own.any():
            own &= coverage[..., color] > EDGE * np.percentile(coverage[..., color][own], 90)
            found += [(color, piece) for piece in _components(own) if piece.sum() >= MIN_AREA * part.size]
    return found


def _normalized(coverage: np.ndarray) -> np.ndarray:
    """(G, G) window around the centroid of a soft (H, W) mask, scaled so that every mask has the same area.

    Area and centroid survive blur, unlike the bounding box.
    """
    # Relative to the peak: a thin stroke that blur has paled, or a shade a little off, keeps its outline.
    coverage = np.clip(coverage / np.percentile(coverage[coverage > EDGE * coverage.max()], 80), 0, 1)
    area = float(coverage.sum())
    rows, columns = np.indices(coverage.shape)
    center_y = float((coverage * (rows + 0.5)).sum()) / area
    center_x = float((coverage * (columns + 0.5)).sum()) / area
    half = WINDOW * area**0.5
    margin = int(half) + 2
    padded = PIL.Image.fromarray(np.pad(coverage, margin).astype(np.float32))
    box = tuple(margin + edge for edge in (center_x - half, center_y - half, center_x + half, center_y + half))
    box = (max(0.0, box[0]), max(0.0, box[1]), min(float(padded.width), box[2]), min(float(padded.height), box[3]))
    return np.asarray(padded.resize((GRID, GRID), PIL.Image.Resampling.BILINEAR, box=box))


@lru_cache(maxsize=1)
def _templates() -> tuple[tuple[str, ...], np.ndarray]:
    """Shape names (K) and normalized masks (K, G * G): every shape at a few sizes and blurs."""
    names, masks = [], []
    for shape in SHAPES:
        for radius in TEMPLATE_RADII:
            for blur in TEMPLATE_BLURS:
                drawn = np.pad(np.asarray(draw_mask(shape, round(radius * 10))), 6)
                blurred = PIL.Image.fromarray(drawn).filter(PIL.ImageFilter.GaussianBlur(blur))
                names.append(shape)
                masks.append(_normalized(np.asarray(blurred, dtype=np.float32) / 255).ravel())
    return tuple(names), np.stack(masks)


def _classify(coverage: np.ndarray) -> tuple[str | None, float]:
    """Best shape of a soft mask and its overlap, sum of minima over sum of maxima (soft IoU, 0..1)."""
    names, templates_KG = _templates()
    mask_G = _normalized(coverage).ravel()
    overlaps_K = np.minimum(templates_KG, mask_G).sum(axis=1) / np.maximum(templates_KG, mask_G).sum(axis=1)
    best = int(overlaps_K.argmax())
    return (names[best] if overlaps_K[best] >= MIN_OVERLAP else None), float(overlaps_K[best])


@lru_cache(maxsize=len(SHAPES))
def _unit_area(shape: str) -> float:
    """Area of a shape with radius 1, in squared radii."""
    return float(np.asarray(draw_mask(shape, 400), dtype=np.float64).sum()) / 255 / 40**2


def _grow(mask: np.ndarray) -> np.ndarray:
    """`mask` and its 8 neighbours."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def _describe(color: int, coverage: np.ndarray, residual: np.ndarray, mask: np.ndarray, others: np.ndarray) -> Thing:
    """One object from its core `mask` and the soft coverage (S, S) of its color around it.

    Its color is None when it is too faint, or its shade is no mixture of that color and the background.
    """
    side = len(mask)
    is_named = np.percentile(coverage[mask], 90) > EDGE and residual[mask].mean() < LARGEST_MISTINT**2
    coverage = coverage * (_grow(_grow(mask)) & ~others)  # the faint outer half of a blurred edge belongs to it
    shape, _ = _classify(coverage)
    rows, columns = np.indices(mask.shape) + 0.5
    area = float(coverage.sum())
    size = None
    if shape is not None:
        radius = (area / _unit_area(shape)) ** 0.5 / side
        size = "small" if radius < (RADII["small"] + RADII["large"]) / 2 else "large"
    x, y = float((coverage * columns).sum()) / area / side, float((coverage * rows).sum()) / area / side
    return Thing(COLOR_NAMES[color] if is_named else None, shape, size, round(x, 4), round(y, 4))


def grade(pixels: np.ndarray) -> Scene:
    """The facts that a (S, S, 3) uint8 picture shows, as a Scene with all relations between its objects.

    background is None when the border has no background color; an object whose outline is like no shape has
    shape None, one of another color has color None. Specks under 0.6 % of the picture are not objects.
    """
    pixels = np.asarray(pixels, dtype=np.float32)
    background, backdrop = _background(pixels)
    foreground = ((pixels - backdrop) ** 2).sum(axis=-1) > FOREGROUND_DISTANCE**2
    coverage, residual = _unmix(pixels, backdrop)
    found: list[tuple[int, np.ndarray]] = []
    for part in _components(foreground):
        if part.sum() >= MIN_AREA * part.size:
            found += _objects_in(part, coverage, residual)
    occupied = sum((mask for _, mask in found), np.zeros(foreground.shape, dtype=bool))
    things = tuple(
        _describe(color, coverage[..., color], residual[..., color], mask, occupied & ~mask) for color, mask in found
    )
    relations = tuple(
        (first, str(relation_between(things[first], things[second])), second)
        for first in range(len(things))
        for second in range(len(things))
        if first != second
    )
    return Scene(background, things, relations, len(things))


def _same_thing(things: tuple[Thing, ...], wanted: Thing) -> Thing | None:
    """The object of the wanted color; among several the one of the wanted shape; None when that is not one."""
    matches = [thing for thing in things if thing.color == wanted.color]
    if len(matches) > 1:
        matches = [thing for thing in matches if thing.shape == wanted.shape]
    return matches[0] if len(matches) == 1 else None


def _relations_hold(stated: Scene, placed: Scene) -> bool:
    """Whether every relation that `stated` states holds between the objects' places in `placed`."""
    for subject, relation, other in stated.relations:
        pair = [_same_thing(placed.objects, stated.objects[index]) for index in (subject, other)]
        if pair[0] is None or pair[1] is None or relation_between(pair[0], pair[1]) != relation:
            return False
    return True


def compare(facts: Scene, scene: Scene) -> dict[str, bool]:
    """Which facts agree with the scene: background, count, colors, shapes, sizes, relations.

    facts: grade(pixels) against a true or a prompted scene (parse_caption of the prompt), or parse_caption of a
    generated caption against the true scene. colors: the multiset of colors; shapes: the multiset of
    (color, shape); sizes: every object is there and no stated size is contradicted; relations: each relation of
    `scene` holds in a graded picture, each relation of a caption holds in `scene` and none is left out (for one
    object there is nothing to hold: true).
    """

    def bag(side: Scene, *names: str) -> list[tuple[str, ...]]:
        return sorted(tuple(str(getattr(thing, name)) for name in names) for thing in side.objects)

    graded = all(thing.x is not None for thing in facts.objects)
    enough = len(facts.relations) >= len(scene.relations)
    relations = enough and (_relations_hold(scene, facts) if graded else _relations_hold(facts, scene))
    pairs = [(_same_thing(facts.objects, wanted), wanted) for wanted in scene.objects]
    sizes = all(found and (None in (found.size, wanted.size) or found.size == wanted.size) for found, wanted in pairs)
    return {
        "background": facts.background is not None and facts.background == scene.background,
        "count": facts.count == scene.count,
        "colors": bag(facts, "color") == bag(scene, "color"),
        "shapes": bag(facts, "color", "shape") == bag(scene, "color", "shape"),
        "sizes": sizes,
        "relations": relations,
    }

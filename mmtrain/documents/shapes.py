"""Procedural scenes with exact ground truth: every document is a pure function of (seed, split, index).

Objects never overlap, colors within a scene differ, and stated relations hold by a clear margin, so that a
caption describes its picture without ambiguity and a grader that sees only pixels can check it.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
import PIL.Image
import PIL.ImageDraw

from mmtrain.config.randomness import random_stream
from mmtrain.documents.captions import (
    NUM_PHRASINGS,
    NUM_PLACE_CHOICES,
    NUM_RELATION_PHRASES,
    NUM_SIZE_CHOICES,
    parse_caption,
    questions,
    write_caption,
)
from mmtrain.documents.corpus import Account, Corpus, Partition
from mmtrain.documents.document import Document, Image
from mmtrain.documents.images import encode_png
from mmtrain.documents.scene import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, Thing, relation_between

__all__ = [
    "HELD_OUT",
    "Shapes",
    "draw_mask",
    "draw_scene",
    "is_held_out",
    "make_document",
    "make_scene",
    "parse_caption",
    "questions",
    "write_caption",
]

MAX_OBJECTS = 3
CHOICES = (NUM_PHRASINGS, NUM_RELATION_PHRASES, NUM_SIZE_CHOICES, NUM_PLACE_CHOICES)
# Never in the train split, to measure whether color and shape combine: one color of each shape, 6 of 48.
HELD_OUT = frozenset(zip(("pink", "cyan", "purple", "orange", "yellow", "green"), SHAPES, strict=True))

# Fractions of the side of the picture. At 48 pixels: radii 8 (small) and 12 (large), gaps of 1.7 pixels.
RADII = {"small": 1 / 6, "large": 1 / 4}
GAP = 0.035
# Centers lie on a lattice of so many steps to the side (8 pixels of 48): what varies is what captions tell, so that a
# small tokenizer can draw every shape.
LATTICE = 6
# A stated relation is plain: along its axis the centers are at least so many times as far apart as across it.
RELATION_SLOPE = 2
TOLERANCE = 1e-9  # of floating point, where a center may lie on a bound
LAYOUT_TRIES = 64
SUPERSAMPLING = 8
SCENES_PER_PARTITION = 2000


class Shapes(Corpus):
    """config.num_documents training scenes and config.num_validation held-out ones; nothing is ever left out."""

    def partitions(self, account: Account) -> list[Partition]:
        """Ranges of scene numbers of one split."""
        sizes = {"train": self.config.num_documents, "validation": self.config.num_validation}
        return [
            {"split": split, "start": start, "stop": min(start + SCENES_PER_PARTITION, size)}
            for split, size in sizes.items()
            for start in range(0, size, SCENES_PER_PARTITION)
        ]

    def documents(self, partition: Partition, account: Account) -> Iterator[Document]:
        """The scenes of the range."""
        for index in range(partition["start"], partition["stop"]):
            document = make_document(self.config.seed, partition["split"], index, self.config.image_size)
            yield replace(document, source=self.config.name)


def is_held_out(thing: Thing) -> bool:
    """Whether this color and shape never meet in the train split."""
    return (thing.color, thing.shape) in HELD_OUT


def _layout(rng: np.random.Generator, radii: np.ndarray) -> np.ndarray | None:
    """Centers (n, 2) as fractions of the side for objects with `radii` (n,), or None when no try fits."""
    num_objects = len(radii)
    low = np.ceil(radii * LATTICE - TOLERANCE)[:, None]
    centers_TN2 = rng.integers(low, LATTICE - low + 1, size=(LAYOUT_TRIES, num_objects, 2)) / LATTICE
    fits_T = np.ones(LAYOUT_TRIES, dtype=bool)
    for first in range(num_objects):
        for second in range(first + 1, num_objects):
            apart_T2 = np.abs(centers_TN2[:, first] - centers_TN2[:, second])
            fits_T &= np.hypot(apart_T2[:, 0], apart_T2[:, 1]) >= radii[first] + radii[second] + GAP
            if first == 0:  # relations are stated to object 0
                fits_T &= apart_T2.max(axis=1) >= RELATION_SLOPE * apart_T2.min(axis=1) - TOLERANCE
    return centers_TN2[int(fits_T.argmax())] if fits_T.any() else None


def _sample_scene(rng: np.random.Generator, allow_held_out: bool) -> Scene:
    num_objects = int(rng.integers(1, MAX_OBJECTS + 1))
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    colors = [list(COLORS)[index] for index in rng.permutation(len(COLORS))[:num_objects]]
    shapes = []
    for color in colors:
        allowed = [shape for shape in SHAPES if allow_held_out or (color, shape) not in HELD_OUT]
        shapes.append(allowed[rng.integers(len(allowed))])
    centers = None
    while centers is None:  # sizes are drawn again with the positions: three large objects seldom fit
        sizes = [SIZES[index] for index in rng.integers(len(SIZES), size=num_objects)]
        centers = _layout(rng, np.array([RADII[size] for size in sizes]))
    objects = tuple(
        Thing(color, shape, size, round(float(x), 4), round(float(y), 4))
        for color, shape, size, (x, y) in zip(colors, shapes, sizes, centers, strict=True)
    )
    relations = tuple(
        (0, str(relation_between(objects[0], other)), index) for index, other in enumerate(objects) if index
    )
    return Scene(background, objects, relations, num_objects)


def make_scene(seed: int, split: str, index: int) -> Scene:
    """The ground truth of one document, without drawing it."""
    return _sample_scene(random_stream("shapes", seed, split, index), split != "train")


def _outline(shape: str, radius: float) -> list[tuple[float, float]]:
    """Corners of a shape around (0, 0), y downwards, inside a circle of `radius`."""
    if shape == "square":
        half = 0.86 * radius
        return [(-half, -half), (half, -half), (half, half), (-half, half)]
    if shape == "triangle":  # moved down a little, so that it stands in the middle of its bounding box
        angles = [math.radians(degrees) for degrees in (-90, 30, 150)]
        return [(radius * 1.1 * math.cos(a), radius * (1.1 * math.sin(a) + 0.2)) for a in angles]
    if shape == "star":
        points = [(radius * (0.45 if step % 2 else 1.08), math.radians(36 * step - 90)) for step in range(10)]
        return [(length * math.cos(angle), length * math.sin(angle)) for length, angle in points]
    if shape == "cross":
        arm, reach = 0.33 * radius, 0.98 * radius
        quarter = [(-arm, -reach), (arm, -reach), (arm, -arm), (reach, -arm), (reach, arm), (arm, arm)]
        return quarter + [(-x, -y) for x, y in quarter]
    raise ValueError(f"no outline for shape {shape!r}")


@lru_cache(maxsize=4096)
def draw_mask(shape: str, radius_tenths: int) -> PIL.Image.Image:
    """Coverage (0-255) of a shape with radius `radius_tenths` / 10 pixels, centered in an "L" picture.

    Drawn at 8 times the size and averaged; radii in tenths of a pixel keep the cache small.
    """
    radius = radius_tenths / 10
    side = 2 * math.ceil(radius * 1.12) + 1
    large = PIL.Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    pen = PIL.ImageDraw.Draw(large)
    center, reach = side * SUPERSAMPLING / 2, radius * SUPERSAMPLING
    if shape in ("circle", "ring"):
        pen.ellipse((center - reach, center - reach, center + reach, center + reach), fill=255)
        if shape == "ring":
            hole = 0.55 * reach
            pen.ellipse((center - hole, center - hole, center + hole, center + hole), fill=0)
    else:
        pen.polygon([(center + x, center + y) for x, y in _outline(shape, reach)], fill=255)
    return large.reduce(SUPERSAMPLING)


def draw_scene(scene: Scene, image_size: int) -> np.ndarray:
    """Draw any scene whose objects have positions: (image_size, image_size, 3) uint8, anti-aliased."""
    canvas = PIL.Image.new("RGB", (image_size, image_size), BACKGROUNDS[str(scene.background)])
    for thing in scene.objects:
        assert thing.x is not None and thing.y is not None
        mask = draw_mask(str(thing.shape), max(10, round(RADII[thing.size or "large"] * image_size * 10)))
        corner = (round(thing.x * image_size - mask.width / 2), round(thing.y * image_size - mask.height / 2))
        canvas.paste(COLORS[str(thing.color)], corner, mask)
    return np.array(canvas)


def make_document(seed: int, split: str, index: int, image_size: int = 64) -> Document:
    """Caption, then picture. meta: split, scene (Scene.to_json), questions ([question, answer]), held_out."""
    rng = random_stream("shapes", seed, split, index)
    scene = _sample_scene(rng, split != "train")
    words = (int(rng.integers(limit)) for limit in CHOICES)
    data = encode_png(draw_scene(scene, image_size))
    image = Image(data, image_size, image_size, hashlib.sha256(data).hexdigest(), "png")
    meta = {
        "split": split,
        "scene": scene.to_json(),
        "questions": [list(pair) for pair in questions(scene)],
        "held_out": any(is_held_out(thing) for thing in scene.objects),
    }
    return Document(f"shapes-{split}-{index:06d}", "shapes", (write_caption(scene, *words), image), meta)

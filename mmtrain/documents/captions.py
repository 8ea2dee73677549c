"""Scenes in words: captions in several phrasings, the parser that reads them back, questions with answers."""

import re

from mmtrain.documents.scene import BACKGROUNDS, COLORS, INVERSE, RELATIONS, SHAPES, SIZES, Scene, Thing

NUMBERS = ("zero", "one", "two", "three")
RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below", "under"),
}
# {a}, {b}, {c}: the objects with their article and place. {ba}, {ca}: how b and c lie to a.
PHRASINGS: dict[int, tuple[str, ...]] = {
    1: (
        "{a} on a {background} background",
        "one shape on {background}: {a}",
        "a {background} background with {a}",
        "a {background} picture of {a}",
    ),
    2: (
        "{a} and {b} {ba} it on a {background} background",
        "two shapes on {background}: {a} and {b} {ba} it",
        "on a {background} background, {a} with {b} {ba} it",
        "a {background} picture of {a} with {b} {ba} it",
    ),
    3: (
        "{a} and {b} {ba} it and {c} {ca} it on a {background} background",
        "three shapes on {background}: {a} and {b} {ba} it and {c} {ca} it",
        "on a {background} background, {a} with {b} {ba} it and {c} {ca} it",
        "a {background} picture of {a} with {b} {ba} it and {c} {ca} it",
    ),
}
NUM_PHRASINGS = 4
NUM_RELATION_PHRASES = 2
# Of four ways to say the sizes, one says them: most captions leave them to the picture.
NUM_SIZE_CHOICES = 4
# Of two ways to say the place of a single object, one says it. Among several each has its place in the caption, before
# it is related to another: what "above" means is learned sooner beside "at the top".
NUM_PLACE_CHOICES = 2


def place(thing: Thing) -> str:
    """Where an object lies in its picture: "at the top left", ..., "in the center"."""
    assert thing.x is not None and thing.y is not None
    rows, columns = (("", "bottom", "top"), ("", "right", "left"))  # indexed by the sign: 0, 1, -1
    words = [rows[_side(thing.y)], columns[_side(thing.x)]]
    return "at the " + " ".join(filter(None, words)) if any(words) else "in the center"


def _side(center: float) -> int:
    """-1, 0 or 1: before, in or behind the middle seventh."""
    return (center > 0.57) - (center < 0.43)


def _noun(thing: Thing, with_size: bool) -> str:
    return " ".join(word for word in (thing.size if with_size else None, thing.color, thing.shape) if word)


def _with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def write_caption(
    scene: Scene, phrasing: int, relation_phrase: int = 0, size_choice: int = 0, place_choice: int = 0
) -> str:
    """One caption that names the background and every object, and for 2-3 objects each of scene.relations.

    The four numbers choose the words; scene.relations must be those of objects 1 (and 2) to object 0, as
    make_scene writes them: (0, relation, 1), (0, relation, 2).
    """
    words = {"background": scene.background or ""}
    for name, thing in zip("abc", scene.objects, strict=False):
        words[name] = _with_article(_noun(thing, size_choice == NUM_SIZE_CHOICES - 1))
        if len(scene.objects) > 1 or place_choice == NUM_PLACE_CHOICES - 1:
            words[name] += " " + place(thing)
    for _, relation, other in scene.relations:
        phrases = RELATION_PHRASES[INVERSE[relation]]
        words[f"{'abc'[other]}a"] = phrases[relation_phrase % len(phrases)]
    return PHRASINGS[len(scene.objects)][phrasing].format(**words)


def _any_of(words: tuple[str, ...]) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


_RELATION_OF_PHRASE = {phrase: name for name, phrases in RELATION_PHRASES.items() for phrase in phrases}
_TOKEN = re.compile(
    rf"\b(?:(?:(?P<size>{_any_of(SIZES)}) )?(?P<color>{_any_of(tuple(COLORS))}) (?P<shape>{_any_of(SHAPES)})"
    rf"|(?P<relation>{_any_of(tuple(_RELATION_OF_PHRASE))})|(?P<it>it)"
    rf"|(?P<background>{_any_of(tuple(BACKGROUNDS))})|(?P<number>{_any_of(NUMBERS[1:])}) shapes?)\b"
)


def parse_caption(text: str) -> Scene:
    """The facts that a caption states: the inverse of write_caption, for grading captions that a model wrote.

    Reads any text: what it does not state is None or empty (gibberish gives Scene(None)). A relation followed
    by "it" belongs to the object before it and points to the first one; any other belongs to the first.
    """
    background: str | None = None
    count: int | None = None
    objects: list[Thing] = []
    relations: list[tuple[int, str, int]] = []
    pending: str | None = None
    for match in _TOKEN.finditer(" ".join(text.lower().split())):
        if match["color"]:
            objects.append(Thing(match["color"], match["shape"], match["size"]))
            if pending and len(objects) > 1:
                relations.append((0, pending, len(objects) - 1))
            pending = None
        elif match["relation"]:
            pending = _RELATION_OF_PHRASE[match["relation"]]
        elif match["it"]:
            if pending and len(objects) > 1:
                relations.append((len(objects) - 1, pending, 0))
            pending = None
        elif match["background"]:
            background = background or match["background"]
        elif match["number"]:
            count = NUMBERS.index(match["number"])
    return Scene(background, tuple(objects), tuple(relations), count or len(objects) or None)


def questions(scene: Scene) -> list[tuple[str, str]]:
    """Questions that the picture answers, each with its one-phrase answer; only unambiguous ones are asked."""
    asked = [
        ("how many shapes are there?", NUMBERS[len(scene.objects)]),
        ("what color is the background?", str(scene.background)),
    ]
    shapes = [thing.shape for thing in scene.objects]
    for thing in scene.objects:
        asked.append((f"what shape is {thing.color}?", str(thing.shape)))
        if shapes.count(thing.shape) == 1:
            asked.append((f"what color is the {thing.shape}?", str(thing.color)))
        if len(scene.objects) == 1:
            asked.append((f"is the {thing.shape} small or large?", str(thing.size)))
    for subject, relation, other in scene.relations:
        first, second = (_noun(scene.objects[index], False) for index in (subject, other))
        comparison = "further left" if relation in RELATIONS[:2] else "higher"
        answer = first if relation in ("left of", "above") else second
        asked.append((f"which is {comparison}, the {first} or the {second}?", answer))
    return asked

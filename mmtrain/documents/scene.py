"""What a scene of shapes is: the words it is made of, its objects, and when a spatial relation holds.

One type serves the ground truth, what a caption claims and what a grader sees; what is not known is None.
"""

from dataclasses import asdict, dataclass
from typing import Any

RGB = tuple[int, int, int]

# Far apart in RGB (nearest pair, yellow and orange: 107), so that blur and noise do not turn one into another.
COLORS: dict[str, RGB] = {
    "red": (215, 25, 35),
    "green": (25, 150, 45),
    "blue": (30, 60, 225),
    "yellow": (255, 230, 20),
    "orange": (250, 125, 0),
    "purple": (130, 20, 170),
    "pink": (255, 100, 195),
    "cyan": (0, 205, 225),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "beige": (225, 205, 150),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Thing:
    """One object. x, y: center as a fraction of the side of the picture, from its left top corner."""

    color: str | None
    shape: str | None
    size: str | None = None
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True)
class Scene:
    """Background, objects and relations (subject index, relation, object index).

    count: number of objects; differs from len(objects) only where a caption contradicts itself.
    """

    background: str | None
    objects: tuple[Thing, ...] = ()
    relations: tuple[tuple[int, str, int], ...] = ()
    count: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of from_json."""
        plain = asdict(self)
        return {**plain, "objects": list(plain["objects"]), "relations": [list(part) for part in self.relations]}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "Scene":
        """The scene that to_json wrote (Document.meta["scene"])."""
        objects = tuple(Thing(**thing) for thing in plain["objects"])
        relations = tuple((int(subject), str(name), int(other)) for subject, name, other in plain["relations"])
        return cls(plain["background"], objects, relations, plain["count"])


def relation_between(subject: Thing, other: Thing) -> str | None:
    """How `subject` lies to `other`, along the axis on which their centers are farther apart.

    The dominant-axis rule is that of T2I-CompBench (Huang et al. 2023, sec. 4.2). None without positions.
    """
    if subject.x is None or subject.y is None or other.x is None or other.y is None:
        return None
    right, down = subject.x - other.x, subject.y - other.y
    if abs(right) >= abs(down):
        return "right of" if right > 0 else "left of"
    return "below" if down > 0 else "above"

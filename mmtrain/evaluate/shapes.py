"""The `shapes` task: draw held-out captions and grade the pixels; caption held-out pictures and read the words."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mmtrain.config import TaskConfig, UserError
from mmtrain.documents import Document, decode_square
from mmtrain.documents.captions import parse_caption
from mmtrain.documents.scene import Scene
from mmtrain.evaluate.distances import Distances, measure_distances
from mmtrain.evaluate.infill import MaskedWord, measure_infill
from mmtrain.evaluate.intervals import Proportion, wilson
from mmtrain.evaluate.shapes_grader import compare, grade
from mmtrain.generate import Sampler, SamplingSettings

CAPTION_FACTS = ("background", "colors", "count", "relations")


@dataclass
class ShapesResult:
    """Shares of pictures and captions that are right, by fact; `ceiling`: the same for reconstructed true pictures.

    pictures_seen, pictures_unseen: those whose captions have only color-shape combinations of the training split, and
    those with one at least that training never showed.
    captions["all"]: captions with background, colors, count and relations all right.
    infilled: words that were masked, one in each caption, and written exactly.
    facts: of each drawn picture, which are right. distances, floor: of the drawn pictures, and of the reconstructed
    true ones, to the true ones; None for a few pictures.
    """

    pictures: dict[str, Proportion]
    pictures_seen: dict[str, Proportion]
    pictures_unseen: dict[str, Proportion]
    ceiling: dict[str, Proportion]
    captions: dict[str, Proportion]
    infilled: dict[str, Proportion]
    facts: list[dict[str, bool]]
    distances: Distances | None
    floor: Distances | None
    drawn: list[tuple[Document, np.ndarray]] = field(default_factory=list)
    written: list[tuple[Document, str]] = field(default_factory=list)
    filled: list[tuple[MaskedWord, str]] = field(default_factory=list)


def evaluate_shapes(
    sampler: Sampler,
    documents: list[Document],
    config: TaskConfig,
    seed: int,
    by_text: Sequence[list[np.ndarray]] | None = None,
    by_picture: Sequence[list[np.ndarray]] | None = None,
) -> ShapesResult:
    """Grade one picture per caption, one caption per picture and one masked word per caption of held-out `documents`.

    by_text, by_picture: token ids of what the caption, and the picture, of each document found, to place before the
    caption to draw, and before the picture to caption; nothing is placed before a caption with a masked word.
    Raises UserError when the documents have no scenes in their meta: only the shapes corpus has.
    """
    if not documents or "scene" not in documents[0].meta:
        raise UserError("task=shapes needs a run on corpus=shapes, whose documents carry their scenes; use task=loss")
    to_draw, to_caption = documents[: config.num_prompts], documents[: config.num_captions]
    to_fill = documents[: config.num_infills]
    settings = SamplingSettings(temperature=config.temperature, top_p=config.top_p, guidance=config.guidance)
    drawn = draw_and_grade(sampler, to_draw, settings, seed, by_text)

    size = sampler.image.image_size
    pictures = np.stack([decode_square(document.images[0].data, size) for document in documents])
    true = pictures[: len(to_draw)]
    reconstructed = sampler.image.decode(sampler.image.encode(true))
    written: list[tuple[Document, str]] = []
    if to_caption:
        greedy = SamplingSettings(temperature=0.0, guidance=1.0)
        captions = sampler.captions(
            pictures[: len(to_caption)], greedy, seed, retrieved=by_picture and by_picture[: len(to_caption)]
        )
        written = [(to_caption[s.prompt], s.text) for s in captions]

    infilled, filled = measure_infill(sampler, to_fill, pictures[: len(to_fill)], seed)

    stated = [_facts(parse_caption(text), document) for document, text in written]
    for facts in stated:
        facts["all"] = all(facts.get(name, True) for name in CAPTION_FACTS)
    return ShapesResult(
        pictures=shares([facts for _, _, facts in drawn]),
        pictures_seen=shares([facts for document, _, facts in drawn if not document.meta["held_out"]]),
        pictures_unseen=shares([facts for document, _, facts in drawn if document.meta["held_out"]]),
        ceiling=shares([_facts(grade(p), document) for p, document in zip(reconstructed, to_draw, strict=True)]),
        captions=shares(stated),
        infilled=infilled,
        facts=[facts for _, _, facts in drawn],
        distances=measure_distances(np.stack([pixels for _, pixels, _ in drawn]), true),
        floor=measure_distances(reconstructed, true),
        drawn=[(document, pixels) for document, pixels, _ in drawn],
        written=written,
        filled=filled,
    )


def draw_and_grade(
    sampler: Sampler,
    documents: Sequence[Document],
    settings: SamplingSettings,
    seed: int,
    retrieved: Sequence[list[np.ndarray]] | None = None,
) -> list[tuple[Document, np.ndarray, dict[str, bool]]]:
    """Draw the caption of each document once, behind the ids that were retrieved for it.

    Returns the document, the picture (S, S, 3) uint8, and which facts are right.
    """
    captions = [document.texts[0] for document in documents]
    samples = sampler.images(captions, settings, seed, retrieved=retrieved and retrieved[: len(captions)])
    return [(documents[s.prompt], s.pixels, _facts(grade(s.pixels), documents[s.prompt])) for s in samples]


def _facts(found: Scene, document: Document) -> dict[str, bool]:
    """What is right; relations only where the scene has any, so that single objects do not flatter the share."""
    scene = Scene.from_json(document.meta["scene"])
    facts = compare(found, scene)
    if not scene.relations:
        del facts["relations"]
    return facts


def shares(facts: list[dict[str, bool]]) -> dict[str, Proportion]:
    """The share of each fact among those that have it."""
    names = dict.fromkeys(name for fact in facts for name in fact)
    holding = {name: [fact[name] for fact in facts if name in fact] for name in names}
    return {name: wilson(sum(holds), len(holds)) for name, holds in holding.items()}

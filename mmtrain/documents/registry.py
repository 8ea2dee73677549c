"""The corpora by name."""

from pathlib import Path

from mmtrain.config import CorpusConfig, UserError
from mmtrain.documents.reading import Reading

CORPORA: dict[str, str] = {
    "shapes": "procedural scenes of 1-3 colored shapes with captions, questions and exact ground truth; no download",
    "stamps": "about 1,000 captioned pictures of Debian's tuxpaint-stamps-default, in up to 60 languages; needs apt",
    "pairs": "your own folder of pictures with captions in .txt files, a .jsonl or a .csv",
    "img2dataset": "the tars that img2dataset writes, read from front to back; nothing is unpacked",
}
SPLITS = ("train", "validation")


def read_corpus(config: CorpusConfig, split: str, cache: Path) -> Reading:
    """The documents of one split ("train" or "validation"); `cache` is a folder that keeps downloads.

    Raises UserError for what the user can mend, at once or at the start of the iteration.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, not one of {SPLITS}")
    # Imported here: drawing scenes must not need the SVG renderer that stamps needs.
    if config.kind == "shapes":
        from mmtrain.documents.shapes import read_shapes

        return read_shapes(config, split)
    if config.kind == "stamps":
        from mmtrain.documents.stamps import read_stamps

        return read_stamps(config, split, cache)
    if config.kind == "pairs":
        from mmtrain.documents.pairs import read_pairs

        return read_pairs(config, split)
    if config.kind == "img2dataset":
        from mmtrain.documents.img2dataset import read_img2dataset

        return read_img2dataset(config, split)
    raise UserError(f"corpus.kind={config.kind} is unknown; choose one of {', '.join(CORPORA)}.")

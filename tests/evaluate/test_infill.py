"""One masked word per caption: which, and of what kind."""

from mmtrain.documents.captions import write_caption
from mmtrain.documents.scene import Scene, Thing
from mmtrain.evaluate import mask_word
from mmtrain.generate import MASK


def test_every_word_of_a_caption_is_masked_in_turn_and_has_a_kind() -> None:
    caption = write_caption(Scene("gray", (Thing("red", "star", "small", 0.2, 0.2),)), phrasing=0)
    words = caption.split()
    seen = {}
    for number in range(300):
        masked = mask_word(caption, (0, "infill", number))
        assert masked.caption.count(MASK) == 1 and masked.caption.replace(MASK, masked.word) == caption
        seen[masked.word] = masked.kind
    assert seen.keys() == set(words)
    assert seen | {"red": "color", "star": "shape", "gray": "background", "a": "other", "on": "other"} == seen


def test_the_word_depends_on_the_key_alone() -> None:
    caption = "two shapes on white: a red ring and a blue ring"
    assert mask_word(caption, (1, "infill", "x")) == mask_word(caption, (1, "infill", "x"))
    assert len({mask_word(caption, (1, "infill", n)).word for n in range(20)}) > 3

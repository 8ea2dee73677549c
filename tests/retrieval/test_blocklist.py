"""The block list: near-copies of evaluation sets are found, and hardly anything else."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mmtrain.config import UserError
from mmtrain.documents import Document, Image, encode_png, image_from_bytes
from mmtrain.retrieval.blocklist import BlockList

WORDS = [f"word{number}" for number in range(200)]
NUM_DOCUMENTS = 40


def sentence(seed: int, length: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, length))


def photograph(seed: int) -> PIL.Image.Image:
    """A smooth picture of random colors, as unlike others as photographs are."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 7, 3)).astype(np.uint8)
    return PIL.Image.fromarray(pixels).resize((160, 160), PIL.Image.Resampling.BICUBIC)


def encoded(picture: PIL.Image.Image, kind: str = "PNG", **options) -> Image:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return image_from_bytes(buffer.getvalue(), 10**7)


def document(*segments: str | Image) -> Document:
    return Document("d", "test", segments, {})


@pytest.fixture(scope="module")
def listed() -> BlockList:
    """Captions of 13 words with photographs of the same seed."""
    return BlockList.of(document(sentence(i, 13), encoded(photograph(i))) for i in range(NUM_DOCUMENTS))


def test_every_caption_is_found_alone_inside_a_longer_text_and_in_other_letters(listed: BlockList) -> None:
    for seed in range(NUM_DOCUMENTS):
        caption = sentence(seed, 13)
        longer = f"{sentence(1000 + seed, 30)} {caption} {sentence(2000 + seed, 30)}"
        other = "“" + caption.upper().replace(" ", ",  ") + "!”"
        halves = [" ".join(caption.split()[:5]), " ".join(caption.split()[5:])]  # a picture may have stood between
        assert listed.blocked([([text], None) for text in (caption, longer, other)]).all()
        assert listed.blocks(halves) and listed.blocks(["unrelated words", longer])
        assert not listed.blocks([caption.rpartition(" ")[0]])


@pytest.mark.parametrize(
    "copy",
    [
        lambda picture: encoded(picture),
        lambda picture: encoded(picture, "JPEG", quality=85),
        lambda picture: encoded(picture, "WEBP", quality=85),
        lambda picture: encoded(picture.resize((90, 90))),
        lambda picture: encoded(picture.resize((1003, 700)), "JPEG"),
    ],
    ids=["same", "jpeg", "webp", "smaller", "larger"],
)
def test_every_picture_is_found_re_encoded_and_resized(
    listed: BlockList, copy: Callable[[PIL.Image.Image], Image]
) -> None:
    windows = [(["unrelated"], copy(photograph(seed))) for seed in range(NUM_DOCUMENTS)]
    assert listed.blocked(windows).all()


def test_what_is_unrelated_is_not_blocked(listed: BlockList) -> None:
    windows = [([sentence(seed, 60)], encoded(photograph(seed))) for seed in range(10_000, 10_200)]
    assert not listed.blocked(windows).any() and not listed.blocked([([], None), (["", "word1"], None)]).any()
    assert len(listed.blocked([])) == 0


def test_a_leak_blocks_its_own_window_only(listed: BlockList) -> None:
    free = ([sentence(5000, 20), sentence(5001, 20)], encoded(photograph(5000)))
    windows = [free, ([sentence(3, 13)], None), ([], None), free, (["word"], encoded(photograph(7))), free]
    assert listed.blocked(windows).tolist() == [False, True, False, False, True, False]
    assert [listed.blocks(*window) for window in windows] == listed.blocked(windows).tolist()


@pytest.mark.parametrize("length", range(1, 13))
def test_a_short_text_blocks_what_contains_it_from_8_words_and_from_5_what_is_nothing_else(length: int) -> None:
    text = " ".join(WORDS[:length])
    short = BlockList.of([document(text)])
    assert short.blocks([text.title()]) == (length >= 5)
    assert short.blocks(["other", text]) == (length >= 5)  # a segment of its own
    assert short.blocks([f"before {text} behind"]) == (length >= 8)
    assert not short.blocks([" ".join(WORDS[1 : length + 1])])


def test_a_run_over_two_segments_of_an_evaluation_document_is_found_in_one() -> None:
    first, second = sentence(1, 4), sentence(2, 9)
    parts = BlockList.of([document(first, encoded(photograph(1)), second)])
    assert parts.blocks([f"so {first} {second} there"]) and not parts.blocks([f"so {first} there"])


def test_pictures_that_are_alike_but_of_other_colors_are_others(listed: BlockList) -> None:
    red, blue = (PIL.Image.merge("RGB", order) for order in (photograph(3).split(), photograph(3).split()[::-1]))
    assert listed.blocks([], encoded(red)) and not listed.blocks([], encoded(blue))


def test_a_picture_that_tells_nothing_is_found_by_its_file_alone() -> None:
    blank, other = (np.full((64, 64, 3), gray, np.uint8) for gray in (255, 254))
    image = image_from_bytes(encode_png(blank), 10**7)
    assert not len((only := BlockList.of([document(image)])).picture_hash)
    assert only.blocks([], image) and not only.blocks([], image_from_bytes(encode_png(other), 10**7))


def test_hashes_are_near_up_to_3_bits_wherever_they_are() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 2000, dtype=np.uint64)
    hashes[:500] = hashes[0] ^ (np.uint64(1) << rng.integers(0, 64, 500, dtype=np.uint64))  # a crowd
    colors = rng.integers(100, 120, (2000, 48)).astype(np.uint8)
    listed = BlockList(np.empty(0, np.uint64), np.empty(0, np.uint64), hashes, colors)
    asked = hashes[rng.integers(0, 2000, 3000)]
    for _ in range(5):
        bits = np.uint64(1) << rng.integers(0, 64, 3000, dtype=np.uint64)
        asked ^= np.where(rng.random(3000) < 0.7, bits, np.uint64(0))
    expected = (np.bitwise_count(hashes ^ asked[:, None]) <= 3).any(axis=1)
    assert 500 < expected.sum() < 2900
    assert (listed.blocks_looks(asked, np.full((3000, 48), 110, np.uint8)) == expected).all()
    assert not listed.blocks_looks(asked, np.full((3000, 48), 150, np.uint8)).any()


def test_saved_and_loaded_it_blocks_the_same_and_order_does_not_count(listed: BlockList, tmp_path: Path) -> None:
    listed.save(tmp_path / "a.npz")
    documents = [document(sentence(i, 13), encoded(photograph(i))) for i in reversed(range(NUM_DOCUMENTS))]
    BlockList.of([*documents, documents[0]]).save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert BlockList.load(tmp_path / "a.npz").blocks([sentence(2, 13)])
    nothing = BlockList.of([])
    nothing.save(tmp_path / "nothing.npz")
    assert not BlockList.load(tmp_path / "nothing.npz").blocks([sentence(2, 13)], encoded(photograph(2)))


def test_a_damaged_file_is_a_sentence(listed: BlockList, tmp_path: Path) -> None:
    path = tmp_path / "list.npz"
    listed.save(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", hashlib.sha256(whole).digest()):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="list.npz holds no block list"):
            BlockList.load(path)
    replace(listed, picture_colors=listed.picture_colors[:-1]).save(path)
    with pytest.raises(UserError, match="holds no block list"):
        BlockList.load(path)

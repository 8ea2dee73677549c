"""Signatures: the same for copies, near for what looks or reads alike, far for everything else."""

import io
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

from mmtrain.config import UserError
from mmtrain.documents import Document, encode_png, image_from_bytes
from mmtrain.documents.signatures import Signatures, perceptual_hash, sign, text_minima

WORDS = [f"word{number}" for number in range(400)]


def photograph(seed: int, side: int = 160) -> PIL.Image.Image:
    """A smooth picture of random colors, as unlike others as photographs are."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 7, 3)).astype(np.uint8)
    return PIL.Image.fromarray(pixels).resize((side, side), PIL.Image.Resampling.BICUBIC)


def encoded(picture: PIL.Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def signed(*segments: str | bytes, document_id: str = "d-1") -> Signatures:
    parts = (image_from_bytes(part, 10**7) if isinstance(part, bytes) else part for part in segments)
    return sign(Document(document_id, "test", tuple(parts), {}))


def num_different_bits(a: Signatures, b: Signatures) -> int:
    return int(np.bitwise_count(a.picture_hash[0] ^ b.picture_hash[0]))


def test_signatures_are_the_same_on_every_machine():
    found = signed("A red circle is to the left of a small blue square. " * 2)
    assert found.content.tobytes().hex()[:16] == "f346ab9fe3d5cd48"
    assert found.text_minima[0, [0, 1, 127]].tolist() == [569212901, 219386757, 407953520]
    pixels = np.random.default_rng(3).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert perceptual_hash(pixels) == (0xA611B19F5A0023C8, True)


def test_content_tells_order_and_borders_of_segments():
    a, b = (encoded(photograph(seed)) for seed in (1, 2))
    versions = [("x", a, "y", b), ("x", b, "y", a), ("x", "y", a, b), ("xy", a, b), ("x", a, "y"), ("x", a, b, "y")]
    assert len({signed(*version).content.tobytes() for version in versions}) == len(versions)
    assert (signed(*versions[0], document_id="other").content == signed(*versions[0]).content).all()


@pytest.mark.parametrize(
    "copy",
    [
        lambda picture: encoded(picture, "JPEG", quality=60),
        lambda picture: encoded(picture, "WEBP", quality=60),
        lambda picture: encoded(picture.resize((90, 90))),
        lambda picture: encoded(picture.resize((1003, 1003)), "JPEG"),
    ],
    ids=["jpeg", "webp", "smaller", "larger"],
)
def test_a_re_encoded_or_resized_picture_is_near(copy):
    for seed in range(8):
        original, other = signed(encoded(photograph(seed))), signed(copy(photograph(seed)))
        assert num_different_bits(original, other) <= 3
        assert np.abs(original.picture_colors.astype(int) - other.picture_colors).max() <= 12
        assert original.picture_tells.all() and other.picture_tells.all()


def test_different_pictures_are_far():
    hashes = [signed(encoded(photograph(seed))) for seed in range(40)]
    assert min(num_different_bits(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > 8


def test_pictures_that_say_nothing_are_marked():
    gradient = np.linspace(0, 255, 64).repeat(64).reshape(64, 64, 1).repeat(3, axis=2).astype(np.uint8)
    nearly_white = np.random.default_rng(0).integers(253, 256, (64, 64, 3)).astype(np.uint8)
    for pixels in (np.zeros((64, 64, 3), np.uint8), nearly_white, gradient):
        assert not signed(encode_png(pixels)).picture_tells.any()
    assert perceptual_hash(np.full((32, 32, 3), 77, np.uint8)) == (0, False)


def test_minima_estimate_the_overlap_of_runs_of_five_words():
    for num_changed in (1, 4, 20):
        changed = list(WORDS)
        for place in range(7, 7 + 10 * num_changed, 10):
            changed[place] = "other"
        a, b = ({tuple(words[i : i + 5]) for i in range(396)} for words in (WORDS, changed))
        estimate = (text_minima(" ".join(WORDS)) == text_minima(" ".join(changed))).mean()
        assert estimate == pytest.approx(len(a & b) / len(a | b), abs=0.1)


def test_case_punctuation_and_repetition_do_not_count():
    text = " ".join(WORDS)
    assert (text_minima(text) == text_minima(f"«{text.upper().replace(' ', ', ')}!»")).all()
    assert (text_minima(" ".join(WORDS * 3)) == text_minima(" ".join(WORDS + WORDS[:4]))).all(), "the same set of runs"


def test_a_long_text_has_the_minima_of_its_parts():
    words = [f"word{number}" for number in range(1500)]  # more than are hashed at once
    parts = [text_minima(" ".join(part)) for part in (words[:700], words[696:])]
    assert (text_minima(" ".join(words)) == np.minimum(*parts)).all()


def test_captions_have_no_minima_in_any_script():
    caption = "a man is riding a wave on top of a white surfboard"  # 12 words
    assert text_minima(f"{caption} {caption}") is not None
    assert text_minima(f"{caption} {caption[2:]}") is None
    assert text_minima("一张非常小的黑猫的照片") is None
    assert text_minima("一张非常小的黑猫的照片" * 3) is not None


def test_a_partition_is_written_and_read_back(tmp_path):
    picture = encoded(photograph(1))
    parts = [
        signed(" ".join(WORDS), picture, encoded(photograph(2)), document_id="a"),
        signed("a cat", document_id="a-longer-id"),
        signed(picture),
    ]
    whole = Signatures.concatenate(parts)
    whole.save(tmp_path / "a.npz")
    Signatures.concatenate([Signatures.load(tmp_path / "a.npz")]).save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    found = Signatures.load(tmp_path / "b.npz")
    assert found.ids.tolist() == [b"a", b"a-longer-id", b"d-1"]
    assert found.num_pictures.tolist() == [2, 0, 1] and found.has_minima.tolist() == [True, False, False]
    assert found.picture_hash[0] == found.picture_hash[2] == parts[2].picture_hash[0]
    assert (found.text_minima == parts[0].text_minima).all()
    nothing = Signatures.concatenate([])
    assert len(nothing) == 0 and len(Signatures.concatenate([nothing, whole])) == 3


def test_a_damaged_file_is_one_sentence(tmp_path):
    path = tmp_path / "a.npz"
    signed("a cat", encoded(photograph(1))).save(path)
    data = path.read_bytes()
    for damaged in (b"", b"junk", data[:-30], data[: len(data) // 2] + b"\0" * 64 + data[len(data) // 2 + 64 :]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="holds no signatures of documents"):
            Signatures.load(path)
    unequal = replace(signed("a cat"), ids=np.array([b"a", b"b"]))
    unequal.save(path)
    with pytest.raises(UserError, match="holds no signatures"):
        Signatures.load(path)
    np.savez(path, ids=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="holds no signatures"):
        Signatures.load(path)
    with pytest.raises(UserError, match="holds no signatures"):
        Signatures.load(tmp_path / "missing.npz")

"""Pictures from strangers: what is accepted, what is refused and why, and how each mode becomes RGB."""

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import PIL.Image
import pytest

from mmtrain.documents import BadImage, decode_square, encode_png, image_from_bytes

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)


def encoded(picture: PIL.Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def header_of_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""
    chunks = b"\x89PNG\r\n\x1a\n"
    for kind, body in [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b""))]:
        chunks += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return chunks


def reason(data: bytes, max_pixels: int = 10**6) -> str:
    with pytest.raises(BadImage) as caught:
        image_from_bytes(data, max_pixels)
    return caught.value.reason


@pytest.mark.parametrize(("kind", "extension"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_three_formats_are_accepted_and_described(kind, extension):
    data = encoded(PIL.Image.fromarray(NOISE), kind)
    image = image_from_bytes(data, 2400)
    assert (image.width, image.height, image.extension, image.data) == (60, 40, extension, data)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "EPS"])
def test_other_formats_are_refused(kind):
    assert reason(encoded(PIL.Image.fromarray(NOISE), kind)) == "not a PNG, JPEG or WebP picture"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_picture_is_refused(kind):
    data = encoded(PIL.Image.fromarray(NOISE), kind)
    assert reason(data[: len(data) // 2]) in ("truncated picture", "unreadable picture")


def test_every_cut_and_flipped_byte_is_accepted_or_refused_but_never_crashes():
    data = bytearray(encoded(PIL.Image.fromarray(NOISE[:8, :8])))
    rng = np.random.default_rng(1)
    for position in rng.integers(0, len(data), 150):
        damaged = data.copy()
        damaged[position] ^= int(rng.integers(1, 256))
        for candidate in (bytes(damaged), bytes(data[:position])):
            with contextlib.suppress(BadImage):
                image_from_bytes(candidate, 10**6)


@pytest.mark.parametrize("side", [2_000, 11_000, 30_000, 2**31 - 1])
def test_pixel_cap_is_read_from_the_header(side):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert reason(header_of_png(side, side)) == "too many pixels"
    assert not seen


def test_nothing_at_all_is_refused():
    assert reason(b"") == "empty file"


def test_transparency_becomes_white_in_every_mode_that_has_it():
    clear = PIL.Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    palette = PIL.Image.new("P", (8, 8), 3)
    palette.putpalette(range(48))
    candidates = [encoded(clear), encoded(clear.convert("LA")), encoded(palette, transparency=3)]
    candidates.append(encoded(PIL.Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3)))
    for data in candidates:
        assert (decode_square(data, 8) == 255).all()


def test_sixteen_bits_are_scaled_and_not_clipped():
    levels = np.full((8, 8), 0x8000, dtype=np.uint16)
    assert (decode_square(encoded(PIL.Image.fromarray(levels)), 8) == 128).all()
    assert (decode_square(encoded(PIL.Image.fromarray(levels), transparency=0x8000), 8) == 255).all()


def test_the_first_of_the_pictures_that_a_phone_puts_into_one_jpeg():
    red, blue = (PIL.Image.new("RGB", (16, 16), color) for color in ((255, 0, 0), (0, 0, 255)))
    image = image_from_bytes(encoded(red, "MPO", save_all=True, append_images=[blue]), 2400)
    assert image.extension == "jpg"
    assert np.abs(decode_square(image.data, 16).astype(int) - (255, 0, 0)).max() < 12


def test_cmyk_and_gray_and_animation_become_rgb():
    red = PIL.Image.new("RGB", (16, 16), (255, 0, 0))
    cmyk = decode_square(encoded(red.convert("CMYK"), "JPEG", quality=95), 16)
    assert np.abs(cmyk.astype(int) - (255, 0, 0)).max() < 12
    assert (decode_square(encoded(PIL.Image.new("L", (8, 8), 7)), 8) == 7).all()
    movie = encoded(red, "WEBP", save_all=True, append_images=[PIL.Image.new("RGB", (16, 16))], lossless=True)
    assert (decode_square(movie, 16) == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(60, 20), (20, 60), (600, 200), (7, 2), (500, 1)])
def test_whole_picture_is_fitted_in_the_middle_on_white(size):
    pixels = decode_square(encoded(PIL.Image.new("RGB", size, (0, 90, 0))), 32)
    inside = (pixels == (0, 90, 0)).all(axis=-1)
    scale = 32 / max(size)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    assert inside.sum() == round(max(1, size[0] * scale)) * round(max(1, size[1] * scale))
    assert (pixels[~inside] == 255).all()
    rows, columns = np.nonzero(inside)
    assert abs(rows.min() + rows.max() - 31) <= 1 and abs(columns.min() + columns.max() - 31) <= 1


def test_photograph_is_turned_as_its_orientation_says():
    upright = PIL.Image.new("RGB", (32, 32), (255, 255, 255))
    upright.paste((0, 0, 0), (0, 0, 32, 16))
    exif = PIL.Image.Exif()
    exif[0x0112] = 3
    pixels = decode_square(encoded(upright, "JPEG", exif=exif), 32)
    assert pixels[4].mean() > 200 > 50 > pixels[28].mean()


def test_png_round_trip():
    square = NOISE[:40, :40]
    assert (decode_square(encode_png(square), 40) == square).all()

"""Pictures of the page keep to their allowance, whatever is in them."""

import base64
import hashlib
import io
import re

import numpy as np
import pytest
from PIL import Image as Pillow

from mmtrain.documents import Image, encode_png
from mmtrain.track.thumbnails import image_element, thumbnail


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def image(data, width, height):
    return Image(data, width, height, hashlib.sha256(data).hexdigest(), "png")


def payload(element):
    return base64.b64decode(re.search(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", element)[1])


@pytest.mark.parametrize("allowance", [2_000, 10_000, 40_000])
def test_a_large_picture_keeps_to_its_allowance_and_shape(allowance):
    element = thumbnail(image(encode_png(noise(600, 900)), 900, 600), allowance, 192, "noise")
    data = payload(element)
    assert len(data) <= allowance
    with Pillow.open(io.BytesIO(data)) as opened:
        assert opened.format == "WEBP" and abs(opened.width / opened.height - 1.5) < 0.05
    width, height = map(int, re.search(r'width="(\d+)" height="(\d+)"', element).groups())
    assert width <= 192 and abs(width / height - 1.5) < 0.1


def test_a_small_picture_is_exact_and_enlarged_by_a_whole_factor():
    pixels = noise(16, 32)
    element = image_element(pixels, 40_000, 192, "noise")
    with Pillow.open(io.BytesIO(payload(element))) as opened:
        assert (np.asarray(opened.convert("RGB")) == pixels).all()
    assert 'class="pixels"' in element and 'width="192" height="96"' in element


def test_a_bad_picture_is_a_note_and_labels_are_escaped():
    assert thumbnail(image(b"<svg onload=1>", 4, 4), 9_000, 192, "x").startswith('<span class="soft">[not a PNG')
    assert 'alt="&quot;&gt;"' in image_element(noise(4, 4), 9_000, 192, '">')

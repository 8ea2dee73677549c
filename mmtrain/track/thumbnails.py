"""Pictures for a page with a limit on its size: scaled down and encoded again until they fit an allowance."""

import base64
import io

import numpy as np
import PIL.Image

from mmtrain.documents import BadImage, Image
from mmtrain.documents.images import downscale_to_png
from mmtrain.track.page import text

SIDES = (384, 256, 160, 96, 48)
LOSSY_QUALITY = 80
LOSSY_BYTES_PER_PIXEL = 0.1  # about; it saves encoding at sides that will not fit


def thumbnail(image: Image, allowance: int, shown: int, label: str) -> str:
    """An <img> of a picture of the corpus, or a note where it cannot be read.

    allowance: most bytes (before base64), kept but for the last of SIDES. shown: side on the page, in CSS pixels.
    """
    fitting = [side for side in SIDES if LOSSY_BYTES_PER_PIXEL * side**2 <= allowance]
    largest = fitting[0] if fitting else SIDES[-1]
    try:
        png = downscale_to_png(image.data, min(largest, max(image.width, image.height, 1)))
    except BadImage as error:
        return f'<span class="soft">[{text(error)}]</span>'
    with PIL.Image.open(io.BytesIO(png)) as picture:
        return image_element(np.asarray(picture), allowance, shown, label)


def image_element(pixels: np.ndarray, allowance: int, shown: int, label: str) -> str:
    """An <img> of (H, W, 3) uint8; small pictures grow by a whole factor and keep their pixels sharp."""
    data = encode_webp(PIL.Image.fromarray(pixels), allowance)
    side = max(pixels.shape[:2])
    scale = shown // side if side <= shown else shown / side
    height, width = (max(1, round(length * scale)) for length in pixels.shape[:2])
    kind = ' class="pixels"' if scale > 1 else ""
    uri = f"data:image/webp;base64,{base64.b64encode(data).decode()}"
    return f'<img{kind} src="{uri}" width="{width}" height="{height}" alt="{text(label, 120)}">'


def encode_webp(picture: PIL.Image.Image, allowance: int) -> bytes:
    """WebP of at most `allowance` bytes: without loss where that fits, else lossy, else smaller, too."""
    data = _webp(picture, lossless=True, quality=40)
    for side in SIDES:
        if len(data) <= allowance:
            break
        picture.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
        data = _webp(picture, lossless=False, quality=LOSSY_QUALITY)
    return data


def _webp(picture: PIL.Image.Image, lossless: bool, quality: int) -> bytes:
    out = io.BytesIO()
    picture.save(out, format="WEBP", lossless=lossless, quality=quality, method=2)
    return out.getvalue()

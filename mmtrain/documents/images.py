"""Pictures from strangers, decoded safely: three formats, a pixel cap read from the header, nothing truncated."""

import hashlib
import io
import warnings

import numpy as np
import PIL.Image
import PIL.ImageOps

from mmtrain.documents.document import Image

# Only these decoders run: the others (EPS starts Ghostscript, PSD, TIFF, ...) widen what a stranger can reach.
FORMATS = ("JPEG", "PNG", "WEBP")
# MPO is how Pillow names a JPEG with more pictures behind the first one, as many phones write it.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
WHITE = (255, 255, 255)


class BadImage(Exception):
    """A picture that cannot be used. `reason` is one of a few fixed phrases to count by, `detail` is free text."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def _open(data: bytes, max_pixels: int | None) -> PIL.Image.Image:
    """Read the header only; raise BadImage for another format or more than max_pixels pixels."""
    if not data:
        raise BadImage("empty file", "0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            picture = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError) as error:
        raise BadImage("too many pixels", str(error)) from error
    except PIL.UnidentifiedImageError as error:
        raise BadImage("not a PNG, JPEG or WebP picture", "unknown header") from error
    except Exception as error:  # damaged headers surface as many types: struct.error, ValueError, SyntaxError, ...
        raise BadImage("unreadable picture", f"{type(error).__name__}: {error}") from error
    if max_pixels is not None and picture.width * picture.height > max_pixels:
        raise BadImage("too many pixels", f"{picture.width} x {picture.height} is more than {max_pixels}")
    return picture


def _load(picture: PIL.Image.Image) -> None:
    """Decode the first frame. Pillow's default (LOAD_TRUNCATED_IMAGES = False) refuses a file cut short."""
    try:
        picture.load()
    except Exception as error:  # as above: decoders of damaged data raise many types
        reason = "truncated picture" if "truncated" in str(error).lower() else "unreadable picture"
        raise BadImage(reason, f"{type(error).__name__}: {error}") from error


def image_from_bytes(data: bytes, max_pixels: int) -> Image:
    """Check an encoded picture and describe it; the bytes are kept as they are.

    The pixel cap is held against the header before any pixel is decoded; then the whole picture is decoded
    once, so that a truncated file is found here and not in the middle of a job.
    Raises BadImage with a reason to count by.
    """
    picture = _open(data, max_pixels)
    _load(picture)
    assert picture.format is not None  # set by every decoder in FORMATS
    sha256 = hashlib.sha256(data).hexdigest()
    return Image(data, picture.width, picture.height, sha256, EXTENSIONS[picture.format])


def _rgb_on_white(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Any mode to RGB: 16 bits scaled to 8, palettes and CMYK converted, transparency laid over white."""
    if picture.mode in SIXTEEN_BIT_MODES:  # convert("RGB") would clip at 255 instead of scaling
        levels = np.asarray(picture).astype(np.int64)
        gray = np.clip(levels >> 8, 0, 255)
        gray[levels == picture.info.get("transparency", -1)] = 255
        return PIL.Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        canvas = PIL.Image.new("RGB", picture.size, WHITE)
        canvas.paste(picture, mask=picture.getchannel("A"))
        return canvas
    return picture.convert("RGB")


def _fit(picture: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """Scale an RGB picture so that its longer side is `side`, aspect kept."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    if size == picture.size:
        return picture
    # reducing_gap: a box reduction to three times the target first, which is fast and looks the same.
    return picture.resize(size, PIL.Image.Resampling.LANCZOS, reducing_gap=3.0)


def _decode(data: bytes, side: int) -> PIL.Image.Image:
    """RGB over white, upright, at full size or a fraction of it that is still well above `side`."""
    picture = _open(data, None)
    picture.draft("RGB", (2 * side, 2 * side))  # JPEG only
    _load(picture)
    return _rgb_on_white(PIL.ImageOps.exif_transpose(picture))


def decode_square(data: bytes, size: int) -> np.ndarray:
    """Decode a picture that image_from_bytes accepted to (size, size, 3) uint8 RGB.

    The whole picture fits inside the square, aspect kept, in the middle, padded with white. First frame of
    an animation, turned as its EXIF orientation says. Raises BadImage.
    """
    fitted = _fit(_decode(data, size), size)
    if fitted.size == (size, size):
        return np.array(fitted)
    square = PIL.Image.new("RGB", (size, size), WHITE)
    square.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    return np.array(square)


def decode_stretched(data: bytes, side: int) -> np.ndarray:
    """Decode a picture that image_from_bytes accepted to (side, side, 3) uint8 RGB, its aspect lost.

    For comparing pictures: the padding of decode_square would make all that are long or tall look alike.
    Otherwise as decode_square. Raises BadImage.
    """
    # Not a smaller fraction of a JPEG: libjpeg rounds its size up, and a shift by half a pixel is seen in a comparison.
    picture = _decode(data, 4 * side)
    return np.asarray(picture.resize((side, side), PIL.Image.Resampling.LANCZOS, reducing_gap=2.0))


def downscale_to_png(data: bytes, longest_side: int) -> bytes:
    """The picture as an RGB PNG (over white) whose longer side is `longest_side`. Raises BadImage."""
    return encode_png(np.asarray(_fit(_decode(data, longest_side), longest_side)))


def encode_png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) or (H, W) uint8 to PNG bytes, the same bytes for the same pixels."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()

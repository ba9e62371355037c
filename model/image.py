"""Encoded bytes to an RGB image, the same way in training, calibration and serving."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from model.png import decode_plain

Header = Image.Image
"""An image whose header was read and whose pixels were not."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


class ImageError(Exception):
    """Bytes that cannot become an image; the message is fit for a client."""

    code = "bad_image"


class UnsupportedImage(ImageError):
    """Not an image, or of a format that is not allowed."""

    code = "unsupported_image"


class BrokenImage(ImageError):
    """An image of an allowed format that is truncated or corrupt."""

    code = "broken_image"


class ImageTooLarge(ImageError):
    """More pixels than allowed, known from the header alone."""

    code = "image_too_large"


def prepare() -> None:
    """Import every format; else the first image that is neither PNG nor JPEG does, for 0.1 s."""
    Image.init()


def decode(data: bytes, size: int, max_pixels: int) -> Image.Image:
    """Decode an image to 8-bit RGB.

    Large JPEGs are decoded at the smallest scale that keeps both sides at least twice `size`
    (`Image.draft`). EXIF orientation is applied, transparency is composited on white, and
    animations give their first frame.

    Args:
        data: the encoded image.
        size: side of the square that the network wants, in pixels.
        max_pixels: the most pixels the header may announce.

    Raises:
        UnsupportedImage, BrokenImage, ImageTooLarge
    """
    return decode_quickly(data, max_pixels) or render(read_header(data, max_pixels), size)


def decode_quickly(data: bytes, max_pixels: int) -> Image.Image | None:
    """What `decode` gives, of small plain PNGs alone: None for everything else."""
    plain = decode_plain(data, max_pixels)
    return None if plain is None else _to_rgb(plain)


def read_header(data: bytes, max_pixels: int) -> Header:
    """Identify an image without decoding its pixels. Arguments and errors as for `decode`."""
    if not data:
        raise UnsupportedImage("no image was sent")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageTooLarge(f"the image has more than {max_pixels} pixels") from None
    except UnidentifiedImageError:
        allowed = ", ".join(FORMATS)
        raise UnsupportedImage(f"not an image, or not one of {allowed}") from None
    except Exception:  # Pillow's parsers raise many kinds on hostile input
        raise BrokenImage("the image's header is broken") from None
    width, height = image.size
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image is {width}x{height}; at most {max_pixels} pixels are allowed"
        )
    if width == 0 or height == 0:
        raise BrokenImage("the image has no pixels")
    return image


def render(image: Header, size: int) -> Image.Image:
    """Decode an opened image's pixels. Arguments and errors as for `decode`."""
    try:
        image.draft("RGB", (2 * size, 2 * size))
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except Image.DecompressionBombError:
        raise ImageTooLarge("a part of the image is too large") from None
    except Exception:  # as above
        raise BrokenImage("the image is truncated or corrupt") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode in _WIDE:
        image = Image.fromarray(_WIDE[image.mode](np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _from_16_bit(pixels: np.ndarray) -> np.ndarray:
    return (pixels >> 8).astype(np.uint8)


def _from_32_bit(pixels: np.ndarray) -> np.ndarray:
    wide = pixels.max() > 255  # a 16-bit image widened, or an 8-bit one
    return np.clip(pixels >> 8 if wide else pixels, 0, 255).astype(np.uint8)


def _from_float(pixels: np.ndarray) -> np.ndarray:
    finite = np.nan_to_num(pixels, nan=0.0, posinf=1.0, neginf=0.0)
    scale = 255 if finite.max() <= 1 else 1
    return np.clip(finite * scale, 0, 255).astype(np.uint8)


_WIDE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "I;16": _from_16_bit,
    "I;16L": _from_16_bit,
    "I;16B": _from_16_bit,
    "I": _from_32_bit,
    "F": _from_float,
}

"""Encoded bytes to an RGB image, the same way in training, calibration and serving."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from model import jpeg, png, tiff

Header = Image.Image
"""An image whose header was read and whose pixels were not."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
"""Of their files' names."""


class ImageError(Exception):
    """Bytes that cannot become an image; the message is fit for a client."""


class UnsupportedImage(ImageError):
    """Not an image, or of a format that is not allowed."""


class BrokenImage(ImageError):
    """An image of an allowed format that is truncated or corrupt."""


class ImageTooLarge(ImageError):
    """More pixels than allowed, known from the header alone."""


MOST_TEXT_BYTES = 4 * 2**20
"""Of a PNG's comments, which are inflated with its header."""

EXIF = ("exif", "Raw profile type exif")
"""Where Pillow keeps it, as it came."""

TWICE_AS_HEAVY = {"WEBP"}
"""Formats whose decoder takes 16 bytes a pixel, where others take up to 9."""

MOST_TILING = 2
"""Times the most pixels that a TIFF's tiles may have, which are whole at its edges too."""

STRIP_PIXELS = 2**20
"""Converted at a time: some conversions need several copies of what they convert."""


def prepare() -> None:
    """Import every format; else the first image that is neither PNG nor JPEG does, for 0.1 s.

    Also lowers Pillow's limit for inflated PNG comments, which is 64 MiB.
    """
    Image.init()
    PngImagePlugin.MAX_TEXT_MEMORY = MOST_TEXT_BYTES


def decode(data: bytes, size: int, max_pixels: int) -> Image.Image:
    """Decode an image to 8-bit RGB.

    Large JPEGs are decoded at the smallest scale that keeps both sides at least twice `size`
    (`Image.draft`). EXIF orientation is applied, transparency is composited on white, and
    animations give their first frame.

    Args:
        data: the encoded image.
        size: side of the square that the network wants, in pixels.
        max_pixels: the most pixels the header may announce; of a WebP, half as many.

    Raises:
        UnsupportedImage, BrokenImage, ImageTooLarge
    """
    return decode_quickly(data, max_pixels) or render(read_header(data, max_pixels), size)


def decode_quickly(data: bytes, max_pixels: int) -> Image.Image | None:
    """What `decode` gives, of small plain PNGs alone: None for everything else."""
    plain = png.decode_plain(data, max_pixels)
    return None if plain is None else _to_rgb(plain)


def read_header(data: bytes, max_pixels: int) -> Header:
    """Identify an image without decoding its pixels. Arguments and errors as for `decode`."""
    if not data:
        raise UnsupportedImage("it is empty")
    _check_as_pillow_would_not(data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageTooLarge(f"the image has more than {max_pixels} pixels") from None
    except UnidentifiedImageError:
        if _begins_like_an_image(data):
            raise BrokenImage("the image's header is broken") from None
        allowed = ", ".join(FORMATS)
        raise UnsupportedImage(f"not an image, or not one of {allowed}") from None
    except Exception:  # Pillow's parsers raise many kinds on hostile input
        raise BrokenImage("the image's header is broken") from None
    _check_size(*image.size, max_pixels // 2 if image.format in TWICE_AS_HEAVY else max_pixels)
    _check_size(*tiff.decoded_size(image), MOST_TILING * max_pixels)
    if image.format == "PNG":
        png.scale_transparency(image, data)
    return image


def decoded_pixels(header: Header) -> int:
    """How many pixels decoding an image takes the time and the memory of."""
    width, height = tiff.decoded_size(header)
    return width * height


def _check_as_pillow_would_not(data: bytes) -> None:
    if data.startswith(jpeg.START_OF_IMAGE) and (much := jpeg.excess(data)):
        raise BrokenImage(f"the image has {much}")
    if data.startswith(png.SIGNATURE) and png.is_damaged(data):
        raise BrokenImage("the image is corrupt: a checksum in it is wrong")


def _begins_like_an_image(data: bytes) -> bool:
    """Whether one of Pillow's parsers takes the first bytes for its own."""
    accepts = (Image.OPEN[name][1] for name in FORMATS if name in Image.OPEN)
    return any(accept is not None and accept(data[:16]) is True for accept in accepts)


def from_pixels(pixels: np.ndarray, max_pixels: int) -> Image.Image:
    """An image that came decoded.

    Args:
        pixels: uint8 `[H, W, 3]`.
        max_pixels: the most that it may have.

    Raises:
        BrokenImage, ImageTooLarge
    """
    height, width, _ = pixels.shape
    _check_size(width, height, max_pixels)
    return Image.fromarray(pixels)


def _check_size(width: int, height: int, most: int) -> None:
    if width * height > most:
        raise ImageTooLarge(f"the image is {width}x{height}; at most {most} pixels are allowed")
    if width == 0 or height == 0:
        raise BrokenImage("the image has no pixels")


def render(image: Header, size: int) -> Image.Image:
    """Decode an opened image's pixels. Arguments and errors as for `decode`."""
    try:
        image.draft("RGB", (2 * size, 2 * size))
        _turn_upright(image)
        return _to_rgb(image)
    except Image.DecompressionBombError:
        raise ImageTooLarge("a part of the image is too large") from None
    except Exception:  # as above
        raise BrokenImage("the image is truncated or corrupt") from None


def _turn_upright(image: Header) -> None:
    """As its EXIF says, of which Pillow would write the rest anew: that fails where any tag is not
    of its usual type."""
    image.load()
    with suppress(Exception):  # it may be no EXIF at all
        image.getexif()
    for name in EXIF:
        image.info.pop(name, None)
    ImageOps.exif_transpose(image, in_place=True)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        image.load()
        return image
    strips = list(_strips(image))
    white = _white(image, strips) if image.mode in _WIDE else 0.0
    negative = tiff.is_negative(image)
    if len(strips) == 1:
        return _strip_to_rgb(image, white, negative)
    whole = Image.new("RGB", image.size)
    for box in strips:
        whole.paste(_strip_to_rgb(image.crop(box), white, negative), box)
    return whole


def _white(image: Image.Image, strips: Sequence[tuple[int, int, int, int]]) -> float:
    """The value that is white, where a pixel's are of more than 8 bits."""
    whites = _WIDE[image.mode]
    if not whites:
        return float(2 ** tiff.grey_bits(image) - 1)
    most = max(float(_finite(np.asarray(image.crop(box))).max()) for box in strips)
    return next((white for white in whites if most <= white), most)


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes that cover an image, each of whole rows."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(image.height, top + rows)


def _strip_to_rgb(image: Image.Image, white: float, negative: bool) -> Image.Image:
    if image.mode in _WIDE:
        pixels = np.asarray(image)
        rounded = _rounded(pixels, white)
        if negative:
            rounded = 255 - rounded
        if (clear := image.info.get("transparency")) is not None:
            rounded[pixels == clear] = 255
        image = Image.fromarray(rounded)
    if image.mode == "La":  # premultiplied, and Pillow converts it to nothing else
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def _rounded(pixels: np.ndarray, white: float) -> np.ndarray:
    """To 8 bits: whole numbers by their highest, others by their share of white."""
    if pixels.dtype.kind == "f":
        return np.clip(_finite(pixels) * (255 / white), 0, 255).astype(np.uint8)
    return np.clip(pixels >> (int(white).bit_length() - 8), 0, 255).astype(np.uint8)


def _finite(pixels: np.ndarray) -> np.ndarray:
    return np.nan_to_num(pixels, nan=0.0, posinf=1.0, neginf=0.0)


_WIDE: dict[str, tuple[float, ...]] = {
    "I;16": (),
    "I;16L": (),
    "I;16B": (),
    "I": (2**8 - 1, 2**16 - 1, 2**31 - 1),
    "F": (1.0, 2**8 - 1, 2**16 - 1),
}
"""Modes of more than 8 bits, each with what may be white: the least that no pixel is above. Without
any, the bits of a pixel say so."""

"""What TIFFs say of their pixels that Pillow leaves to whoever asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image, TiffImagePlugin

WIDTH, HEIGHT, BITS, PHOTOMETRIC, TILE_WIDTH, TILE_HEIGHT = 256, 257, 258, 262, 322, 323
"""Tags of the TIFF 6.0 specification."""
WHITE_IS_ZERO = 0


def decoded_size(image: Image.Image) -> tuple[int, int]:
    """Width and height that are decoded: of all tiles, where it has any, which may be larger than
    the image by as much as their author liked."""
    tags = _tags(image)
    # As stored: Pillow's size is that of the image turned upright.
    width, height = tags.get(WIDTH, image.width), tags.get(HEIGHT, image.height)
    return _rounded_up(width, tags.get(TILE_WIDTH)), _rounded_up(height, tags.get(TILE_HEIGHT))


def grey_bits(image: Image.Image) -> int:
    """Bits of a grey pixel that has more than 8: Pillow widens those of 12 to 16 as they are."""
    bits, *_ = _tags(image).get(BITS, (16,))
    return int(bits)


def is_negative(image: Image.Image) -> bool:
    """Whether 0 is white; Pillow turns only those of 8 bits and less."""
    return bool(_tags(image).get(PHOTOMETRIC) == WHITE_IS_ZERO)


def _tags(image: Image.Image) -> Mapping[int, Any]:
    """None where it is no TIFF."""
    return image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}


def _rounded_up(size: int, tile: object) -> int:
    """To whole tiles; sizes that are none are for Pillow to refuse."""
    return -(-size // tile) * tile if isinstance(tile, int) and tile > 0 else size

"""What TIFFs say of their pixels that Pillow leaves to whoever asks."""

from __future__ import annotations

from PIL import Image, TiffImagePlugin

WIDTH, HEIGHT, BITS, PHOTOMETRIC, TILE_WIDTH, TILE_HEIGHT = 256, 257, 258, 262, 322, 323
"""Tags of the TIFF 6.0 specification."""
WHITE_IS_ZERO = 0


def decoded_size(image: Image.Image) -> tuple[int, int]:
    """Width and height that are decoded: of all tiles, where it has any, which may be larger than
    the image by as much as their author liked."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.size
    tags = image.tag_v2  # as stored: Pillow's size is that of the image turned upright
    return (
        _rounded_up(tags[WIDTH], tags.get(TILE_WIDTH)),
        _rounded_up(tags[HEIGHT], tags.get(TILE_HEIGHT)),
    )


def grey_bits(image: Image.Image) -> int:
    """Bits of a grey pixel that has more than 8: Pillow widens those of 12 to 16 as they are."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 16
    bits = image.tag_v2.get(BITS, (16,))
    return int(bits[0])


def is_negative(image: Image.Image) -> bool:
    """Whether 0 is white; Pillow turns only those of 8 bits and less."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    return bool(image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO)


def _rounded_up(size: int, tile: object) -> int:
    """To whole tiles; sizes that are none are for Pillow to refuse."""
    return -(-size // tile) * tile if isinstance(tile, int) and tile > 0 else size

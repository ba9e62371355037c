"""Small plain PNGs to pixels by Pillow's own decoder, without its parser.

Pillow's parser, which is Python, takes more than twice as long on an image of 32x32 as its
decompression and filters, which are C. What goes another way here gives the same pixels: a test
compares them.
"""

from __future__ import annotations

import zlib
from struct import Struct

from PIL import Image

MOST_PIXELS = 128 * 128
"""For larger images the parser's time does not matter."""

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MODES = {0: "L", 2: "RGB", 6: "RGBA"}
"""By colour type, a letter a channel; what is not here has a palette."""
CHUNK, CHECK = Struct(">I4s"), Struct(">I")
HEADER = Struct(">II5B")
OPENING = SIGNATURE + CHUNK.pack(HEADER.size, b"IHDR")
DEPTH_AT, GREY = 24, 0
"""Where bits a channel are said, before the colour type, and the one without colours."""
LOWER_CASE = 0x20
"""In the first letter of a kind of chunk that may be left alone."""
LEAST_BYTES = len(OPENING) + HEADER.size + 2 * CHUNK.size + 3 * CHECK.size


def decode_plain(data: bytes, max_pixels: int) -> Image.Image | None:
    """Decode a PNG of 8 bits a channel that is a header, one chunk of pixels, and an end.

    The header is looked at first, so that what is large, or has many chunks, costs nothing here.

    Args:
        data: the encoded image.
        max_pixels: the most pixels the header may announce.

    Returns:
        Of mode L, RGB or RGBA; None for everything else, broken images included, which is for
        Pillow's parser to take or to refuse.
    """
    if not data.startswith(OPENING) or len(data) < LEAST_BYTES:
        return None
    width, height, depth, colour, *others = HEADER.unpack_from(data, len(OPENING))
    mode = MODES.get(colour)
    pixels = width * height
    if mode is None or depth != 8 or any(others) or not 0 < pixels <= min(MOST_PIXELS, max_pixels):
        return None
    compressed = _only_pixels(data, 2 * pixels * len(mode) + 4096)
    if compressed is None:
        return None
    try:
        return Image.frombytes(mode, (width, height), compressed, "zip", mode)
    except ValueError:
        return None


def _only_pixels(data: bytes, most_bytes: int) -> bytes | None:
    """The one chunk between header and end, if all of them are whole."""
    at, body = len(SIGNATURE), None
    for wanted in (b"IHDR", b"IDAT", b"IEND"):
        if len(data) - at < CHUNK.size + CHECK.size:
            return None
        length, kind = CHUNK.unpack_from(data, at)
        start, stop = at + CHUNK.size, at + CHUNK.size + length
        if kind != wanted or length > most_bytes or len(data) < stop + CHECK.size:
            return None
        if CHECK.unpack_from(data, stop)[0] != zlib.crc32(data[at + 4 : stop]):
            return None
        if kind == b"IDAT":
            body = data[start:stop]
        at = stop + CHECK.size
    return body


def scale_transparency(image: Image.Image, data: bytes) -> None:
    """Have the transparent colour of an opened PNG be of as many bits as its pixels will: Pillow
    makes those of 2 and 4 bits, and those of 16 in each colour, ones of 8."""
    clear = image.info.get("transparency")
    depth, colour = data[DEPTH_AT], data[DEPTH_AT + 1]
    if isinstance(clear, int) and colour == GREY and depth in (2, 4):
        image.info["transparency"] = clear * 255 // (2**depth - 1)
    elif isinstance(clear, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def is_damaged(data: bytes) -> bool:
    """Whether a chunk of a PNG that is needed to draw it fails its checksum.

    Pillow does not look at those of the pixels, and draws whatever they inflate to. What is cut off
    it notices.
    """
    at, bytes_of = len(SIGNATURE), memoryview(data)  # a slice of which is no copy
    while len(data) - at >= CHUNK.size + CHECK.size:
        length, kind = CHUNK.unpack_from(data, at)
        stop = at + CHUNK.size + length
        if len(data) < stop + CHECK.size:
            return False
        needed = not kind[0] & LOWER_CASE
        if needed and CHECK.unpack_from(data, stop)[0] != zlib.crc32(bytes_of[at + 4 : stop]):
            return True
        at = stop + CHECK.size
        if kind == b"IEND":
            return False
    return False

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
"""By colour type; what is not here has a palette."""
CHUNK = Struct(">I4s")
HEADER = Struct(">II5B")
OPENING = SIGNATURE + CHUNK.pack(HEADER.size, b"IHDR")


def decode_plain(data: bytes, max_pixels: int) -> Image.Image | None:
    """Decode a PNG of 8 bits a channel that has a header, pixels, an end and nothing else.

    Args:
        data: the encoded image.
        max_pixels: the most pixels the header may announce.

    Returns:
        Of mode L, RGB or RGBA; None for everything else, broken images included, which is for
        Pillow's parser to take or to refuse.
    """
    if not data.startswith(OPENING):
        return None
    chunks = _chunks(data)
    if chunks is None:
        return None
    width, height, depth, colour, *others = HEADER.unpack(chunks[0])
    mode = MODES.get(colour)
    pixels = width * height
    if mode is None or depth != 8 or any(others) or not 0 < pixels <= min(MOST_PIXELS, max_pixels):
        return None
    try:
        return Image.frombytes(mode, (width, height), b"".join(chunks[1:]), "zip", mode)
    except ValueError:
        return None


def _chunks(data: bytes) -> list[bytes] | None:
    """Header and pixels, if all is well and there is nothing else before the end."""
    found: list[bytes] = []
    at, wanted = len(SIGNATURE), b"IHDR"
    while len(data) - at >= CHUNK.size:
        length, kind = CHUNK.unpack_from(data, at)
        stop = at + CHUNK.size + length
        check = data[stop : stop + 4]
        if zlib.crc32(data[at + 4 : stop]).to_bytes(4, "big") != check:
            return None
        if kind == b"IEND":
            return found
        if kind != wanted:
            return None
        found.append(data[at + CHUNK.size : stop])
        at, wanted = stop + 4, b"IDAT"
    return None

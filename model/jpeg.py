"""JPEGs that take far longer to decode than their size lets on."""

from __future__ import annotations

import re

START_OF_IMAGE = b"\xff\xd8"
MOST_SCANS = 100
"""As libtiff has it. A progressive image has about ten; each goes over all its pixels, however few
bytes it has."""
MOST_SEGMENTS = 2000
"""A camera's comments and profiles are some hundred at most; each takes Pillow's parser time."""

MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
"""What begins a segment; the others stand within a scan's own data, or are padding."""
LENGTH_BYTES = 2
BARE = {0x01, 0xD8}
"""Markers without a segment."""
SCAN, END = 0xDA, 0xD9


def excess(data: bytes) -> str | None:
    """What a JPEG has too many of, if it does.

    What comes after the image's end does not count, such as the video of a moving photograph, nor
    what a segment holds, such as a thumbnail.

    Args:
        data: the encoded image.
    """
    at = scans = segments = 0
    while (marker := MARKER.search(data, at)) and (kind := marker[1][0]) != END:
        segments += 1
        scans += kind == SCAN
        if scans > MOST_SCANS:
            return f"more than {MOST_SCANS} scans"
        if segments > MOST_SEGMENTS:
            return f"more than {MOST_SEGMENTS} segments"
        at = marker.end()
        if kind not in BARE:
            at += int.from_bytes(data[at : at + LENGTH_BYTES])
    return None

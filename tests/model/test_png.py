"""Small plain PNGs: the same pixels as by Pillow's parser, and everything else left to it."""

import io
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from model.image import BrokenImage, ImageError, ImageTooLarge, decode, read_header, render
from model.png import CHUNK, HEADER, MOST_PIXELS, SIGNATURE, decode_plain

LIMIT = 10**6


def image(mode="RGB", width=9, height=7, seed=0):
    rng = np.random.default_rng(seed)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "LA": (2,)}.get(mode, ())
    pixels = rng.integers(0, 256, (height, width, *channels), np.uint8)
    return Image.fromarray(pixels, mode if mode in ("LA",) else None)


def png(picture, **options):
    out = io.BytesIO()
    picture.save(out, "PNG", **options)
    return out.getvalue()


def chunk(kind, body):
    check = zlib.crc32(kind + body).to_bytes(4, "big")
    return CHUNK.pack(len(body), kind) + body + check


def assemble(pixels, width=9, height=7, header=(8, 2, 0, 0, 0), before=(), cut=10**6):
    """A PNG by hand: compressed `pixels` in chunks of so many bytes, behind some other chunks."""
    parts = [pixels[i : i + cut] for i in range(0, len(pixels), cut)]
    return b"".join(
        [
            SIGNATURE,
            chunk(b"IHDR", HEADER.pack(width, height, *header)),
            *before,
            *(chunk(b"IDAT", part) for part in parts),
            chunk(b"IEND", b""),
        ]
    )


def raw(width=9, height=7, channels=3):
    """Compressed rows of no filter."""
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 256, (height, 1 + width * channels), np.uint8)
    rows[:, 0] = 0
    return zlib.compress(rows.tobytes())


def by_parser(data):
    return np.asarray(render(read_header(data, LIMIT), 32))


def outcome(read, data):
    """Pixels, or which error."""
    try:
        return np.asarray(read(data)).tolist()
    except ImageError as error:
        return type(error), str(error)


@given(
    st.sampled_from(["L", "RGB", "RGBA"]),
    st.integers(1, 127),  # of more Pillow may write two chunks, of 64 KiB
    st.integers(1, 127),
    st.integers(0, 9),
    st.integers(0, 99),
)
def test_its_pixels_are_those_of_pillows_parser(mode, width, height, level, seed):
    data = png(image(mode, width, height, seed), compress_level=level)
    assert decode_plain(data, LIMIT).mode == mode
    assert np.array_equal(decode(data, 32, LIMIT), by_parser(data))


@pytest.mark.parametrize("filtered", range(5))
def test_every_filter_is_undone(filtered):
    rows = np.random.default_rng(filtered).integers(0, 256, (7, 28), np.uint8)
    rows[:, 0] = filtered
    data = assemble(zlib.compress(rows.tobytes()))
    assert decode_plain(data, LIMIT) is not None
    assert np.array_equal(decode(data, 32, LIMIT), by_parser(data))


def test_rows_that_are_missing_from_several_chunks_are_broken_as_with_pillows_parser():
    rows = zlib.compress(bytes(5))  # the first of four rows of four pixels
    data = assemble(rows, 4, 4, (8, 0, 0, 0, 0), cut=len(rows) - 1)
    with pytest.raises(BrokenImage):
        by_parser(data)
    with pytest.raises(BrokenImage):
        decode(data, 32, LIMIT)


class Counted(bytes):
    """Bytes that count how many of them were copied."""

    copied = 0

    def __getitem__(self, key):
        taken = super().__getitem__(key)
        Counted.copied += len(taken) if isinstance(key, slice) else 1
        return taken


@pytest.mark.parametrize(
    "data",
    [
        assemble(raw(600, 500), 600, 500),
        assemble(b"", before=[chunk(b"IDAT", b"\x00") * 300_000]),
        assemble(zlib.compress(bytes(9)) + bytes(500_000), 1, 1),
    ],
    ids=["large", "of many chunks", "of too many bytes"],
)
def test_what_is_large_is_not_looked_at_here(data):
    Counted.copied = 0
    assert decode_plain(Counted(data), LIMIT) is None
    assert Counted.copied < 100


def test_rows_that_are_missing_are_black_as_with_pillows_parser():
    data = assemble(raw(height=6))
    assert decode_plain(data, LIMIT) is not None
    assert np.array_equal(decode(data, 32, LIMIT), by_parser(data))


def test_what_follows_the_end_is_nothing():
    data = png(image())
    assert decode_plain(data + b"more", LIMIT) == decode_plain(data, LIMIT)


def with_text(key, value):
    text = PngImagePlugin.PngInfo()
    text.add_text(key, value)
    return png(image(), pnginfo=text)


def with_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    return png(image(), exif=exif)


OTHERS = {
    "palette": png(image().convert("P")),
    "grey with transparency": png(image("LA")),
    "one bit": png(image("L").convert("1")),
    "16 bits": png(Image.fromarray(np.full((3, 3), 4000, np.uint16))),
    "a transparent colour": png(image(), transparency=(1, 2, 3)),
    "orientation": with_orientation(),
    "text": with_text("Raw profile type exif", "\nexif\n 0\n"),
    "resolution": png(image(), dpi=(72, 72)),
    "interlaced": assemble(raw(), header=(8, 2, 0, 0, 1)),
    "an unknown filter method": assemble(raw(), header=(8, 2, 0, 1, 0)),
    "no size": assemble(raw(), width=0),
    "too large": png(image("L", 129, 128)),
    "several chunks of pixels": assemble(raw(), cut=7),
    "two headers": assemble(raw(), before=[chunk(b"IHDR", HEADER.pack(9, 7, 8, 2, 0, 0, 0))]),
    "no pixels": assemble(b""),
    "what is not compressed": assemble(b"\x01" * 90),
    "nothing": b"",
    "a signature": SIGNATURE,
    "a JPEG": b"\xff\xd8\xff\xe0",
}


@pytest.mark.parametrize("data", OTHERS.values(), ids=OTHERS.keys())
def test_everything_else_is_left_to_pillows_parser(data):
    assert decode_plain(data, LIMIT) is None
    assert outcome(lambda d: decode(d, 32, LIMIT), data) == outcome(by_parser, data)


def test_an_image_cut_anywhere_is_left_to_pillows_parser():
    data = png(image())
    for length in range(len(data) - 4):  # the check of the end may be missing
        assert decode_plain(data[:length], LIMIT) is None


def test_a_byte_that_changed_anywhere_is_noticed():
    data = png(image("RGBA"))
    for at in range(len(data)):
        changed = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
        assert decode_plain(changed, LIMIT) is None
        assert outcome(lambda d: decode(d, 32, LIMIT), changed) == outcome(by_parser, changed)


def test_the_limit_of_pixels_holds():
    assert decode_plain(png(image("L", 128, 128)), MOST_PIXELS) is not None
    small = png(image())
    assert decode_plain(small, 62) is None and decode_plain(small, 63) is not None
    with pytest.raises(ImageTooLarge):
        decode(small, 32, 62)


def test_broken_pixels_are_broken():
    with pytest.raises(BrokenImage):
        decode(assemble(b"\x01" * 90), 32, LIMIT)


@pytest.mark.parametrize("side", [9, 300])
def test_pixels_that_fail_their_checksum_are_broken(side):
    whole = png(image("RGB", side, side))
    decode(whole, 32, LIMIT)
    for place in range(whole.index(b"IDAT") + 4, len(whole) - 16, len(whole) // 20):
        flipped = whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]
        with pytest.raises(BrokenImage):
            decode(flipped, 32, LIMIT)

"""Every kind of image becomes 8-bit RGB as a person would see it, or is a clear error."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from model.image import (
    FORMATS,
    BrokenImage,
    ImageError,
    ImageTooLarge,
    UnsupportedImage,
    decode,
    decoded_pixels,
    prepare,
    read_header,
    render,
)
from model.jpeg import MOST_SCANS, MOST_SEGMENTS
from tests.conftest import encode, noise

LIMIT = 10**6
RED, BLUE = (255, 0, 0), (0, 0, 255)


def decoded(image, format="PNG", size=32, **options):
    return np.asarray(decode(encode(image, format, **options), size, LIMIT)).astype(int)


def halves(left, right, mode="RGB", side=32):
    """An image of two colours, side by side."""
    image = Image.new(mode, (side, side), left)
    image.paste(right, (side // 2, 0, side, side))
    return image


def tiff(pixels, bits=8, photometric=1, compression=1, sample=1, tile=None, orientation=1, **size):
    """A grey TIFF, of 32x32 unless said otherwise, whose only strip or tile is `pixels`."""
    width, height = size.get("width", 32), size.get("height", 32)
    entries = {256: width, 257: height, 258: bits, 259: compression, 262: photometric}
    entries |= {274: orientation, 277: 1, 339: sample}
    entries |= {322: tile[0], 323: tile[1]} if tile else {278: 32}
    start = 8 + 2 + 12 * (len(entries) + 2) + 4
    where, how_long = (324, 325) if tile else (273, 279)
    entries |= {where: start, how_long: len(pixels)}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + pixels


def tiff_of(kind, pixels=bytes(100), side=2):
    """A TIFF whose pixels are of a kind that Pillow has in its table, or might."""
    order, photometric, sample, fill, bits, extra = kind
    tags = {256: [side], 257: [side], 258: bits, 259: [1], 262: [photometric], 266: [fill]}
    tags |= {273: [8], 277: [len(bits)], 278: [side], 279: [len(pixels)], 338: extra, 339: sample}
    tags |= {320: range(3 * 2 ** bits[0])} if photometric == 3 else {}
    sign, table = "<" if order == b"II" else ">", b""
    for tag, numbers in sorted((tag, numbers) for tag, numbers in tags.items() if numbers):
        value = struct.pack(f"{sign}{len(numbers)}H", *numbers)
        if len(value) > 4:  # it stands elsewhere
            where = struct.pack(f"{sign}I", 8 + len(pixels))
            pixels, value = pixels + value, where
        table += struct.pack(f"{sign}HHI", tag, 3, len(numbers)) + value.ljust(4, b"\0")
    head = order + struct.pack(f"{sign}HI", 42, 8 + len(pixels))
    return head + pixels + struct.pack(f"{sign}H", len(table) // 12) + table + bytes(4)


@pytest.mark.parametrize("format", FORMATS)
def test_every_allowed_format_is_decoded_to_rgb(format):
    image = decode(encode(halves(RED, BLUE), format), 32, LIMIT)
    assert image.mode == "RGB"
    assert image.size == (32, 32)
    pixels = np.asarray(image).astype(int)
    assert np.abs(pixels[16, 4] - RED).max() <= 8
    assert np.abs(pixels[16, 28] - BLUE).max() <= 8


@pytest.mark.parametrize("format", ["ICO", "PPM", "TGA", "PCX", "JPEG2000", "DDS"])
def test_other_formats_are_refused_with_the_list_of_allowed_ones(format):
    with pytest.raises(UnsupportedImage, match="PNG, JPEG, WEBP, GIF, BMP, TIFF"):
        decode(encode(noise(), format), 32, LIMIT)


@pytest.mark.parametrize("data", [b"", b"hello", b"\0" * 100, b'{"image": 1}', b"<svg/>"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(UnsupportedImage):
        decode(data, 32, LIMIT)


ORIENTED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_honoured(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    upright, turn = noise(12, 20), ORIENTED[orientation]
    expected = upright if turn is None else upright.transpose(turn)
    assert np.array_equal(decoded(upright, format, exif=exif, **options), np.asarray(expected))


XRESOLUTION = 282


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("held", ["sideways", "upright"])
def test_other_exif_may_be_of_any_type(format, held):
    """Old cameras and tools write tags that Pillow reads and would not write."""
    exif = Image.Exif()
    exif[0x0112] = 6 if held == "sideways" else 1
    entries = exif.tobytes()
    at = entries.index(b"MM\0*") if b"MM\0*" in entries else entries.index(b"II*\0")
    order = ">" if entries[at : at + 2] == b"MM" else "<"
    tag = struct.pack(order + "HHI4s", XRESOLUTION, 2, 3, b"72\0\0")
    (count,) = struct.unpack_from(order + "H", entries, at + 8)
    changed = entries[:at] + entries[at : at + 8] + struct.pack(order + "H", count + 1)
    changed += entries[at + 10 : at + 10 + 12 * count] + tag + b"\0\0\0\0"
    image = decode(encode(halves(RED, BLUE), format, exif=changed), 32, LIMIT)
    first = np.asarray(image).astype(int)[4, 4]
    assert np.abs(first - RED).max() <= 8
    assert Image.open(io.BytesIO(encode(noise(), format, exif=changed))).getexif()[XRESOLUTION]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"Exif\0\0no exif at all", b"Exif\0\0MM\0*\0\0\0\x08\0\x09"])
def test_exif_that_is_none_spoils_no_image(format, exif):
    assert decode(encode(halves(RED, BLUE), format, exif=exif), 32, LIMIT).size == (32, 32)


def test_a_photo_held_sideways_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = decoded(halves(RED, BLUE), "JPEG", exif=exif, quality=95)
    assert np.abs(pixels[4, 16] - RED).max() <= 8
    assert np.abs(pixels[28, 16] - BLUE).max() <= 8


def test_transparency_is_composited_on_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (decoded(image) == 255).all()
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert np.abs(decoded(image) - 127).max() <= 1


def test_grey_with_transparency_is_composited_on_white():
    assert np.abs(decoded(Image.new("LA", (8, 8), (0, 51))) - 204).max() <= 1


def test_grey_that_its_alpha_was_multiplied_with_is_composited_on_white():
    pixels = bytes([0, 0, 51, 51, 0, 128, 100, 200])
    image = decode(tiff_of((b"II", 1, (1,), 1, (8, 8), (1,)), pixels), 32, LIMIT)
    grey = np.asarray(image).astype(int)
    assert np.abs(grey - np.reshape([255, 255, 127, 155], (2, 2, 1))).max() <= 1


NOT_UNPACKED = {"L;IR", "P;1R", "P;2R", "P;4R"}
"""Kinds in Pillow's table that it does not decode."""
KINDS = {k: mode for k, (mode, raw) in TiffImagePlugin.OPEN_INFO.items() if raw not in NOT_UNPACKED}


@pytest.mark.parametrize("mode", sorted({*KINDS.values()}))
def test_every_kind_of_tiff_that_pillow_decodes_becomes_rgb(mode):
    for kind in (kind for kind, its in KINDS.items() if its == mode):
        assert decode(tiff_of(kind), 32, LIMIT).mode == "RGB"


def test_a_colour_that_stands_for_transparency_becomes_white():
    pixels = decoded(halves(RED, BLUE), transparency=RED)
    assert (pixels[16, 4] == 255).all()
    assert (pixels[16, 28] == BLUE).all()


def test_a_16_bit_grey_that_stands_for_transparency_becomes_white():
    grey = np.full((32, 32), 40_000, np.uint16)
    grey[:, :16] = 1000
    pixels = decoded(Image.fromarray(grey), transparency=1000)
    assert (pixels[16, 4] == 255).all()
    assert (pixels[16, 28] == 40_000 >> 8).all()


def test_a_palette_gives_its_colours():
    image = halves(RED, BLUE).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    assert np.array_equal(decoded(image), np.asarray(halves(RED, BLUE)))


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_transparent_palette_entry_becomes_white(format):
    image = halves(0, 1, "P")
    image.putpalette([*RED, *BLUE])
    pixels = decoded(image, format, transparency=0)
    assert (pixels[16, 4] == 255).all()
    assert (pixels[16, 28] == BLUE).all()


@pytest.mark.parametrize(("mode", "dark", "bright"), [("L", 40, 200), ("1", 0, 1)])
def test_grey_becomes_equal_channels(mode, dark, bright):
    pixels = decoded(halves(dark, bright, mode))
    assert (pixels[:, :, :1] == pixels).all()
    scale = 255 if mode == "1" else 1
    assert pixels[16, 4, 0] == dark * scale
    assert pixels[16, 28, 0] == bright * scale


def test_cmyk_becomes_the_colours_that_are_printed():
    pixels = decoded(halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK"), "JPEG", quality=95)
    assert np.abs(pixels[16, 4] - RED).max() <= 12
    assert np.abs(pixels[16, 28] - BLUE).max() <= 12


def grey16(low, high):
    pixels = np.full((32, 32), low, np.uint16)
    pixels[:, 16:] = high
    return Image.fromarray(pixels)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_to_eight(format):
    pixels = decoded(grey16(0x1234, 0xFEDC), format)
    assert set(pixels[:, :16].ravel()) == {0x12}
    assert set(pixels[:, 16:].ravel()) == {0xFE}


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(20, 200, (20, 200)), (512, 65535, (2, 255))]
)
def test_wide_integers_are_scaled_by_what_they_hold(low, high, expected):
    pixels = decoded(halves(low, high, "I"), "TIFF")
    assert (pixels[16, 4, 0], pixels[16, 28, 0]) == expected


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 255.0)])
def test_floating_point_is_scaled_by_what_it_holds(low, high):
    pixels = decoded(halves(low, high, "F"), "TIFF")
    assert (pixels[16, 4, 0], pixels[16, 28, 0]) == (0, 255)


def test_floating_point_that_is_no_number_is_black():
    pixels = np.array([[np.nan, 1.0], [np.inf, -np.inf]], np.float32)
    assert decoded(Image.fromarray(pixels), "TIFF")[:, :, 0].tolist() == [[0, 255], [255, 0]]


RAMP = np.arange(32) / 31


def ramp(pixels):
    """Rows that go from one side to the other."""
    return np.broadcast_to(pixels, (32, 32)).copy()


def of_12_bits(pixels):
    first, second = pixels.reshape(-1, 2).T.astype(int)
    packed = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
    return np.stack(packed, axis=1).astype(np.uint8).tobytes()


WIDE_TIFFS = {
    "12 bits": tiff(of_12_bits(ramp(np.round(4095 * RAMP))), bits=12),
    "16 bits": tiff(ramp(np.round(65535 * RAMP)).astype("<u2").tobytes(), bits=16),
    "16 bits, 0 is white": tiff(
        ramp(np.round(65535 * (1 - RAMP))).astype("<u2").tobytes(), bits=16, photometric=0
    ),
    "32 bits": tiff(ramp(np.round((2**31 - 1) * RAMP)).astype("<i4").tobytes(), bits=32, sample=2),
    "floats to 65535": tiff(ramp(65535 * RAMP).astype("<f4").tobytes(), bits=32, sample=3),
    "floats to 255": tiff(ramp(255 * RAMP).astype("<f4").tobytes(), bits=32, sample=3),
    "floats to 1": tiff(ramp(RAMP).astype("<f4").tobytes(), bits=32, sample=3),
}


@pytest.mark.parametrize("name", WIDE_TIFFS)
def test_a_wide_grey_tiff_keeps_its_range(name):
    pixels = np.asarray(decode(WIDE_TIFFS[name], 32, LIMIT)).astype(int)
    assert np.abs(pixels[..., 0] - 255 * RAMP).max() <= 2


def test_a_tile_is_no_larger_than_an_image_may_be():
    """Its size has nothing to do with the image's, and it is inflated whole."""
    small = tiff(zlib.compress(bytes(64 * 64)), compression=8, tile=(64, 64))
    assert decode(small, 32, 64 * 64).size == (32, 32)
    large = tiff(zlib.compress(bytes(2048 * 2048)), compression=8, tile=(2048, 2048))
    assert decoded_pixels(read_header(large, 2048 * 2048)) == 2048 * 2048
    with pytest.raises(ImageTooLarge):
        read_header(large, LIMIT)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiles_are_counted_as_they_are_stored_whichever_way_the_image_is_held(orientation):
    size = {"width": 1000, "height": 16}
    turned = tiff(b"", compression=8, tile=(16, 1000), orientation=orientation, **size)
    assert decoded_pixels(read_header(turned, LIMIT)) == 1008 * 1000


def grey_png(depth, clear, colour=0):
    """Every value of so few bits in a row of its own, of which one stands for transparency."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    rows, samples = 2**depth if depth < 8 else 4, 3 if colour else 1
    value = [r * (0x1111 if depth == 16 else 1) for r in range(rows)]
    if depth == 16:
        lines = [b"\0" + struct.pack(">H", v) * 8 * samples for v in value]
    else:
        per_byte = sum(1 << (depth * i) for i in range(8 // depth))
        lines = [b"\0" + bytes([v * per_byte]) * depth for v in value]
    header = struct.pack(">IIBBBBB", 8, rows, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"tRNS", struct.pack(">H", value[clear]) * samples)]
    parts += [(b"IDAT", zlib.compress(b"".join(lines))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(("depth", "colour"), [(1, 0), (2, 0), (4, 0), (16, 0), (16, 2)])
def test_the_transparent_colour_of_a_png_of_any_depth_becomes_white(depth, colour):
    pixels = np.asarray(decode(grey_png(depth, 1, colour), 32, LIMIT))
    steps = {1: 255, 2: 85, 4: 17, 16: 17}[depth]
    for row, line in enumerate(pixels):
        assert (line == (255 if row == 1 else steps * row)).all(), row


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_gives_its_first_frame(format):
    options = {"lossless": True} if format == "WEBP" else {}
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert (np.asarray(decode(data, 32, LIMIT)) == RED).all()


@pytest.mark.parametrize(("side", "scaled"), [(2000, 250), (500, 125), (96, 96), (64, 64)])
def test_a_large_jpeg_is_decoded_at_the_least_scale_that_is_twice_the_size(side, scaled):
    data = encode(Image.new("RGB", (side, side), RED), "JPEG")
    assert decode(data, 32, 10**7).size == (scaled, scaled)


def test_a_scaled_jpeg_looks_like_the_whole_one():
    small = np.asarray(noise(16, 16)).repeat(32, 0).repeat(32, 1)
    data = encode(Image.fromarray(small), "JPEG", quality=95)
    shrunk = decode(data, 32, LIMIT).resize((16, 16), Image.Resampling.BOX)
    assert np.abs(np.asarray(shrunk).astype(int) - np.asarray(noise(16, 16))).mean() < 6


CUT = {format: encode(noise(64, 64), format) for format in FORMATS}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_image_is_broken(format, share):
    data = CUT[format]
    with pytest.raises(BrokenImage):
        decode(data[: int(len(data) * share)], 32, LIMIT)


@pytest.mark.parametrize("format", FORMATS)
def test_damage_anywhere_is_a_broken_image_or_a_picture_but_no_other_failure(format):
    random = np.random.default_rng(0)
    for _ in range(40):
        data = bytearray(CUT[format])
        for at in random.integers(0, len(data), 8):
            data[at] = random.integers(0, 256)
        try:
            assert decode(bytes(data), 32, LIMIT).mode == "RGB"
        except ImageError as error:
            assert str(error)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width, height, comments=b""):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + comments + pixels + chunk(b"IEND", b"")


def test_an_image_over_the_pixel_limit_is_refused_from_its_header():
    with pytest.raises(ImageTooLarge, match="1001x1000; at most 1000000 pixels"):
        read_header(png_header(1001, 1000), LIMIT)
    assert read_header(png_header(1000, 1000), LIMIT).size == (1000, 1000)


def test_a_decompression_bomb_is_refused_from_its_header():
    with pytest.raises(ImageTooLarge):
        read_header(png_header(60_000, 60_000), LIMIT)


def test_a_webp_may_have_half_as_many_pixels_since_it_takes_twice_the_memory():
    data = encode(Image.new("RGB", (100, 100)), "WEBP")
    assert read_header(data, 20_000).size == (100, 100)
    with pytest.raises(ImageTooLarge, match="100x100; at most 9999 pixels"):
        read_header(data, 19_999)


def jpeg_with_scans(scans):
    """A progressive one whose last scan is repeated."""
    data = encode(noise(), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    last, end = data[start:-2], data[-2:]
    return data[:start] + last * (scans - data[:start].count(b"\xff\xda")) + end


def test_a_jpeg_that_goes_over_its_pixels_again_and_again_is_refused_from_its_header():
    assert decode(encode(noise(), "JPEG", progressive=True), 32, LIMIT)
    read_header(jpeg_with_scans(MOST_SCANS), LIMIT)
    with pytest.raises(BrokenImage, match="more than 100 scans"):
        read_header(jpeg_with_scans(MOST_SCANS + 1), LIMIT)


def test_a_jpeg_of_thousands_of_comments_is_refused_before_they_are_parsed():
    start, rest = encode(noise(), "JPEG")[:2], encode(noise(), "JPEG")[2:]
    decode(start + b"\xff\xfe\0\2" * (MOST_SEGMENTS - 20) + rest, 32, LIMIT)
    with pytest.raises(BrokenImage, match="more than 2000 segments"):
        read_header(start + b"\xff\xfe\0\2" * MOST_SEGMENTS + rest, LIMIT)


def test_a_photographs_video_and_thumbnail_are_none_of_its_scans():
    photograph = encode(noise(), "JPEG", comment=b"\xff\xda" * (MOST_SCANS + 1))
    video = b"ftyp" + b"\xff\xda\0\2" * (MOST_SCANS + 1)
    assert decode(photograph + video, 32, LIMIT).size == (32, 32)


def test_comments_that_are_inflated_with_a_header_are_bounded():
    prepare()
    comment = chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2**20)))
    assert read_header(png_header(10, 10, comment * 4), LIMIT).size == (10, 10)
    with pytest.raises(BrokenImage):
        read_header(png_header(10, 10, comment * 5), LIMIT)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16", "I", "F"])
def test_large_images_are_converted_in_strips_to_the_same_pixels(mode, monkeypatch):
    size, wide = (
        (32, 32),
        {"I;16": (np.uint16, 2**16), "I": (np.int32, 2**16), "F": (np.float32, 1)},
    )
    kind, most = wide.get(mode, (None, 0))
    if kind:
        image = Image.fromarray((np.random.default_rng(0).random(size) * most).astype(kind))
    else:
        image = noise().convert("RGBA" if mode in ("LA", "RGBA") else "RGB")
        if mode in ("LA", "RGBA"):
            image.putalpha(noise(seed=1).convert("L"))
        image = image.convert(mode)
    format = "PNG" if mode in ("RGBA", "LA", "P", "L", "1", "I;16") else "TIFF"
    whole = decoded(image, format)
    monkeypatch.setattr("model.image.STRIP_PIXELS", 5 * 32)
    assert (decoded(image, format) == whole).all()


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ImageError):
        decode(png_header(0, 0), 32, LIMIT)
    with pytest.raises(ImageError):
        decode(png_header(0, 5), 32, LIMIT)


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
def test_odd_shapes_are_images_too(size):
    assert decode(encode(Image.new("RGB", size)), 32, LIMIT).size == size


def test_reading_a_header_decodes_no_pixels():
    data = CUT["PNG"][:200]
    header = read_header(data, LIMIT)
    assert header.size == (64, 64)
    with pytest.raises(BrokenImage):
        render(header, 32)


@pytest.mark.parametrize("data", [b"x", CUT["JPEG"][:300], png_header(0, 0)])
def test_errors_tell_a_client_nothing_of_the_inside(data):
    with pytest.raises(ImageError) as error:
        decode(data, 32, LIMIT)
    assert "PIL" not in str(error.value)
    assert "0x" not in str(error.value)  # no address of a buffer

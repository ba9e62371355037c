"""Images of every kind over HTTP are answered like the pixels that a person sees."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests.conftest import encode, noise

SIDE = 32


def said(server, data):
    """All that the last exit says of an image."""
    response = server.post(data, threshold=1, top_k=10)
    assert response.status_code == 200, response.text
    return response.json()["top_k"]


def picture(seed=1):
    """Smooth enough for JPEG, and unlike itself when turned."""
    return noise(4, 4, seed).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def half_seen():
    """A picture whose left half is transparent, and what is seen of it on white."""
    image = picture().convert("RGBA")
    alpha = np.full((SIDE, SIDE), 255, np.uint8)
    alpha[:, : SIDE // 2] = 0
    image.putalpha(Image.fromarray(alpha))
    seen = np.asarray(picture()).copy()
    seen[:, : SIDE // 2] = 255
    return image, Image.fromarray(seen)


def grey_16():
    """A 16-bit picture, and its upper bytes."""
    deep = np.random.default_rng(3).integers(0, 2**16, (SIDE, SIDE), np.uint16)
    return Image.fromarray(deep), Image.fromarray((deep >> 8).astype(np.uint8))


def palette_with_hole():
    """A palette picture with one transparent colour, and what is seen of it on white."""
    image = picture().quantize(16)
    hole = image.getpixel((0, 0))
    seen = np.asarray(image.convert("RGB")).copy()
    seen[np.asarray(image) == hole] = 255
    return encode(image, transparency=hole), Image.fromarray(seen)


def animation(format, **options):
    return encode(picture(1), format, save_all=True, append_images=[picture(2)], **options)


def kinds():
    rgb = picture()
    seethrough, on_white = half_seen()
    deep, upper = grey_16()
    cmyk = rgb.convert("CMYK")
    hole, around = palette_with_hole()
    grey_alpha = seethrough.convert("LA")
    grey_on_white = Image.composite(
        seethrough.convert("L"), Image.new("L", rgb.size, 255), seethrough.getchannel("A")
    )
    return {
        "PNG, grey": (encode(rgb.convert("L")), rgb.convert("L")),
        "PNG, grey and alpha": (encode(grey_alpha), grey_on_white),
        "PNG, black and white": (encode(rgb.convert("1")), rgb.convert("1")),
        "PNG, palette": (encode(rgb.quantize(64)), rgb.quantize(64)),
        "PNG, palette with a transparent colour": (hole, around),
        "PNG, alpha": (encode(seethrough), on_white),
        "PNG, 16 bit": (encode(deep), upper),
        "TIFF, 16 bit": (encode(deep, "TIFF"), upper),
        "TIFF": (encode(rgb, "TIFF", compression="tiff_lzw"), rgb),
        "TIFF, CMYK": (encode(cmyk, "TIFF"), cmyk),
        "TIFF, first page": (animation("TIFF"), rgb),
        "BMP": (encode(rgb, "BMP"), rgb),
        "WebP": (encode(rgb, "WEBP", lossless=True), rgb),
        "WebP, alpha": (encode(seethrough, "WEBP", lossless=True, exact=True), on_white),
        "WebP, first frame": (animation("WEBP", lossless=True), rgb),
        "GIF": (encode(rgb.quantize(64), "GIF"), rgb.quantize(64)),
        "APNG, first frame": (animation("PNG"), rgb),
    }


KINDS = kinds()


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_answered_like_its_visible_pixels_in_a_png(server, kind):
    data, seen = KINDS[kind]
    assert said(server, data) == said(server, encode(seen.convert("RGB")))


def test_the_answers_compared_above_tell_pictures_apart(server):
    whole = [said(server, encode(p)) for p in (picture(1), picture(2), half_seen()[1])]
    assert whole[0] != whole[1] != whole[2] != whole[0]


def test_of_an_animated_gif_the_first_frame_is_answered(server):
    first = encode(picture(1), "GIF")
    assert said(server, animation("GIF")) == said(server, first)
    assert said(server, animation("GIF")) != said(server, encode(picture(2), "GIF"))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_of_any_colour_space_is_answered_like_its_pixels(server, mode):
    data = encode(picture().convert(mode), "JPEG", quality=95)
    assert said(server, data) == said(server, as_png(data))


def as_png(data):
    return encode(Image.open(BytesIO(data)).convert("RGB"))


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_the_orientation_in_exif_is_honoured(server, orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = encode(picture(), format, exif=exif)
    upright = picture().transpose(TURNS[orientation])
    assert said(server, turned) == said(server, encode(upright))
    assert said(server, turned) != said(server, encode(picture()))


def test_a_photograph_is_answered_like_its_reduction(server):
    large = picture().resize((3000, 3000), Image.Resampling.BICUBIC)
    photograph = said(server, encode(large, "JPEG", quality=95))
    small = said(server, encode(large.resize((SIDE, SIDE), Image.Resampling.BOX)))
    assert photograph[0]["label"] == small[0]["label"]
    by_label = {label["label"]: label["probability"] for label in small}
    for label in photograph:
        assert label["probability"] == pytest.approx(by_label[label["label"]], abs=0.05)


def test_an_image_in_a_multipart_body_is_answered_whatever_its_name_says(server):
    data = KINDS["WebP"][0]
    part = ("photo.png", data, "text/plain")
    response = server.client.post("/classify?threshold=1&top_k=10", files={"file": part})
    assert response.json()["top_k"] == said(server, data)


def test_a_declared_content_type_is_no_obstacle(server):
    data = KINDS["BMP"][0]
    for content_type in ("image/jpeg", "application/x-www-form-urlencoded", "text/html", ""):
        response = server.client.post(
            "/classify?threshold=1&top_k=10", content=data, headers={"content-type": content_type}
        )
        assert response.json()["top_k"] == said(server, data)

"""Any decoded image becomes the network's input, the same way wherever it is done."""

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from model.preprocess import Preprocess
from tests.conftest import noise

PLAIN = Preprocess(size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def rows(width, height):
    """An image whose columns tell where they are: red rises from left to right."""
    red = np.linspace(0, 255, width).astype(np.uint8)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = red
    return Image.fromarray(pixels)


def test_an_image_of_the_right_size_is_taken_pixel_by_pixel():
    assert np.array_equal(PLAIN.pixels(noise()), np.asarray(noise()))


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (33, 31), (500, 375), (7, 900)])
def test_any_size_becomes_the_networks(size):
    pixels = PLAIN.pixels(Image.new("RGB", size, (10, 20, 30)))
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - (10, 20, 30)).max() <= 1


def test_the_central_square_is_kept():
    red = PLAIN.pixels(rows(96, 32))[:, :, 0]
    assert red.min() == pytest.approx(255 / 3, abs=4)
    assert red.max() == pytest.approx(255 * 2 / 3, abs=4)


def test_a_crop_keeps_its_share_of_the_shorter_side():
    half = Preprocess(size=32, crop=0.5, mean=(0, 0, 0), std=(1, 1, 1))
    red = half.pixels(rows(64, 64))[:, :, 0]
    assert red.min() == pytest.approx(255 / 4, abs=4)
    assert red.max() == pytest.approx(255 * 3 / 4, abs=4)
    assert half.pixels(noise(32, 32)).shape == (32, 32, 3)


def test_pixels_are_normalised_by_channel():
    pixels = torch.from_numpy(np.asarray(noise()).copy())[None]
    expected = (pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(PLAIN.mean).view(3, 1, 1)) / (
        torch.tensor(PLAIN.std).view(3, 1, 1)
    )
    torch.testing.assert_close(PLAIN.normalise(pixels), expected, rtol=1e-4, atol=1e-5)


def test_normalised_images_lie_channels_last_in_the_dtype_asked_for():
    pixels = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    x = PLAIN.normalise(pixels, torch.bfloat16)
    assert x.shape == (2, 3, 32, 32)
    assert x.dtype == torch.bfloat16
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_is_normalised_as_its_images_are():
    pixels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    singles = torch.cat([PLAIN.normalise(one) for one in pixels.split(1)])
    assert torch.equal(PLAIN.normalise(pixels), singles)


def test_training_and_serving_see_the_same_pixels(tmp_path):
    from training import data

    for i in range(2):
        (tmp_path / "a").mkdir(exist_ok=True)
        noise(45, 37, seed=i).save(tmp_path / "a" / f"{i}.png")
    images = data.load(data.list_folder(tmp_path), PLAIN)
    served = [PLAIN.pixels(noise(45, 37, seed=i)) for i in range(2)]
    assert np.array_equal(images.pixels.numpy(), np.stack(served))


def test_a_preprocess_comes_back_from_its_file_as_it_was():
    PLAIN.normalise(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))  # fills its cache
    again = Preprocess.model_validate_json(PLAIN.model_dump_json())
    assert again.model_dump() == PLAIN.model_dump()


@pytest.mark.parametrize("fields", [{"size": 4}, {"crop": 0}, {"crop": 1.5}, {"mean": (0, 0)}])
def test_values_that_mean_nothing_are_refused(fields):
    with pytest.raises(ValidationError):
        Preprocess(**{"size": 32, "mean": (0, 0, 0), "std": (1, 1, 1)} | fields)

"""Augmentation's laws, its operations against Pillow's."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from training import operations as do
from training.augment import augment, crop_and_flip, cutout, erase
from training.distort import AUTO, POLICY, TRIVIAL, auto_augment, trivial_augment
from training.mixing import mix
from training.recipe import Recipe


def images(n=16, side=32):
    """Smooth images, as photographs are: (uint8 [N, H, W, 3])."""
    small = torch.rand(n, 3, 6, 6, generator=seeded())
    large = torch.nn.functional.interpolate(small, (side, side), mode="bicubic")
    return (large.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def strengths(value, n=16):
    return torch.full((n,), float(value))


def by_pillow(pixels, change):
    changed = [np.asarray(change(Image.fromarray(p.numpy()))) for p in pixels]
    return torch.from_numpy(np.stack(changed))


@pytest.mark.parametrize("strength", [-0.9, -0.3, 0.0, 0.4, 0.9])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (do.brightness, ImageEnhance.Brightness),
        (do.colour, ImageEnhance.Color),
        (do.contrast, ImageEnhance.Contrast),
        (do.sharpness, ImageEnhance.Sharpness),
    ],
)
def test_enhancements_are_pillows_to_one_step(ours, theirs, strength):
    pixels = images()
    expected = by_pillow(pixels, lambda image: theirs(image).enhance(1 + strength))
    difference = (ours(pixels, strengths(strength)).int() - expected.int()).abs()
    assert difference.max() <= 1


@pytest.mark.parametrize(
    ("ours", "strength", "theirs"),
    [
        (do.posterize, 3, lambda image: ImageOps.posterize(image, 3)),
        (do.posterize, 8, lambda image: image),
        (do.solarize, 100, lambda image: ImageOps.solarize(image, 100)),
        (do.solarize, 256, lambda image: image),
        (do.invert, 0, ImageOps.invert),
        (do.equalize, 0, ImageOps.equalize),
        (do.autocontrast, 0, ImageOps.autocontrast),
    ],
)
def test_point_operations_are_pillows(ours, strength, theirs):
    pixels = images()
    expected = by_pillow(pixels, theirs)
    difference = (ours(pixels, strengths(strength)).int() - expected.int()).abs()
    assert difference.max() <= (1 if ours is do.autocontrast else 0)


@pytest.mark.parametrize("operation", [do.equalize, do.autocontrast])
def test_an_image_of_one_colour_stays(operation):
    pixels = torch.full((2, 8, 8, 3), 77, dtype=torch.uint8)
    assert torch.equal(operation(pixels, strengths(0, 2)), pixels)


@pytest.mark.parametrize("operation", [o for o in AUTO if AUTO[o].signed])
def test_no_strength_changes_nothing(operation):
    pixels = images()
    assert torch.equal(operation(pixels, strengths(0)), pixels)


def test_a_translation_moves_whole_pixels_and_fills_with_grey():
    pixels = images()
    moved = do.translate_x(pixels, strengths(4 / 32))
    assert torch.equal(moved[:, :, :-4], pixels[:, :, 4:])
    assert (moved[:, :, -4:] == do.FILL).all()
    assert torch.equal(do.translate_y(pixels, strengths(-4 / 32))[:, 4:], pixels[:, :-4])


def test_a_quarter_turn_is_exact():
    pixels = images()
    turned = do.rotate(pixels, strengths(90))
    expected = [torch.rot90(pixels, k, (1, 2)) for k in (1, -1)]
    assert any(torch.equal(turned, e) for e in expected)


def test_a_shear_keeps_the_middle_and_moves_opposite_ends_apart():
    rows = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    rows[:, :, 16] = 255
    sheared = do.shear_x(rows, torch.tensor([0.5]))[0, :, :, 0].int()
    bright = (sheared > do.FILL).float().argmax(1)
    assert bright[0] != bright[15] != bright[31]
    assert (bright[0] - 16) * (bright[31] - 16) < 0


def test_each_image_has_its_own_strength():
    pixels = images(2)
    changed = do.brightness(pixels, torch.tensor([0.0, -1.0]))
    assert torch.equal(changed[0], pixels[0])
    assert (changed[1] == 0).all()


AUGMENTATIONS = {
    "crop_and_flip": lambda p, g: crop_and_flip(p, 4, g),
    "cutout": lambda p, g: cutout(p, 8, g),
    "erase": lambda p, g: erase(p, 0.5, g),
    "trivial": trivial_augment,
    "auto": auto_augment,
    "mixup": lambda p, g: mix(p, torch.arange(len(p)), len(p), 0.5, 0.0, g)[0],
    "cutmix": lambda p, g: mix(p, torch.arange(len(p)), len(p), 0.0, 0.5, g)[0],
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_keeps_shape_and_type_and_depends_on_its_generator_alone(name):
    pixels = images(64)
    before = pixels.clone()
    once, again, other = (AUGMENTATIONS[name](pixels, seeded(s)) for s in (1, 1, 2))
    assert once.shape == pixels.shape and once.dtype == torch.uint8
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert torch.equal(pixels, before)


def test_a_crop_without_pad_is_the_image_or_its_mirror():
    pixels = images()
    for image, changed in zip(pixels, crop_and_flip(pixels, 0, seeded()), strict=True):
        assert torch.equal(changed, image) or torch.equal(changed, image.flip(1))
    assert torch.equal(crop_and_flip(pixels, 0, seeded(), mirror=False), pixels)


def test_cutout_blackens_at_most_its_square():
    changed = cutout(torch.full((64, 32, 32, 3), 9, dtype=torch.uint8), 8, seeded())
    black = (changed == 0).all(-1).flatten(1).sum(1)
    assert (black <= 64).all() and (black >= 16).all() and (black == 64).any()


def test_erase_leaves_the_other_images_whole():
    pixels = torch.zeros(400, 32, 32, 3, dtype=torch.uint8)
    touched = (erase(pixels, 0.25, seeded()) > 0).flatten(1).float().mean(1)
    assert 0.15 < (touched > 0).float().mean() < 0.35
    assert touched.max() < 0.4


def test_trivial_augment_takes_every_operation():
    assert len(TRIVIAL) == 14
    pixels = images(300)
    changed = (trivial_augment(pixels, seeded()) != pixels).flatten(1).any(1).float().mean()
    assert 0.7 < changed < 0.97  # identity is one of fourteen, and no strength one of 31


def test_the_policy_is_25_pairs_with_chances_and_levels():
    assert len(POLICY) == 25
    for move in (move for pair in POLICY for move in pair):
        assert 0 <= move.chance <= 1 and 0 <= move.level <= 9 and move.operation in AUTO


def test_labels_share_what_pixels_share():
    n = 200
    pixels = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 32, 32, 3)
    mixed, labels = mix(pixels, torch.arange(n), n, 0.0, 0.5, seeded())
    torch.testing.assert_close(labels.sum(1), torch.ones(n))
    for image, label in zip(mixed, labels, strict=True):
        values, counts = image[..., 0].flatten().unique(return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            assert label[value] == pytest.approx(count / 1024, abs=1e-5)


def test_mixup_blends_by_the_share_of_the_label():
    pixels = torch.tensor([0, 200], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 4, 4, 3)
    mixed, labels = mix(pixels, torch.tensor([0, 1]), 2, 1.0, 0.0, seeded(3))
    expected = (labels[:, 1] * 200).round().view(2, 1, 1, 1).expand(2, 4, 4, 3)
    assert (mixed.float() - expected).abs().max() <= 1


def test_nothing_mixed_leaves_class_ids_as_they_are():
    ids = torch.arange(16)
    pixels = images()
    same, target = augment(pixels, ids, 16, Recipe(pad=0, mirror=False), seeded())
    assert torch.equal(target, ids) and torch.equal(same, pixels)

"""Small folders of images, with runs over them."""

import numpy as np
import pytest
import torch
from PIL import Image

from model.network import build
from model.preprocess import Preprocess
from training.data import ImageSet
from training.distributed import Processes
from training.recipe import Recipe
from training.run import start
from training.student import Student
from training.work import Work

CLASSES = ("dark", "light", "middle")
PREPROCESS = Preprocess(size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
CPU = Processes(torch.device("cpu"))


def write_images(root, classes=CLASSES, n=12, side=16):
    """PNGs whose brightness tells their class: `root/CLASS/*.png`."""
    rng = np.random.default_rng(0)
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            noise = rng.integers(0, 64, (side, side, 3))
            level = 190 * c // max(1, len(classes) - 1)
            Image.fromarray((noise + level).astype(np.uint8)).save(root / name / f"{i:03}.png")
    return root


def image_set(n=48, classes=CLASSES, side=16):
    """The same kind of images, in memory."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(n) % len(classes)
    noise = torch.randint(0, 64, (n, side, side, 3), generator=generator)
    pixels = (noise + ids.view(n, 1, 1, 1) * (190 // (len(classes) - 1))).to(torch.uint8)
    return ImageSet(tuple(classes), pixels, ids, ())


def tiny_net(seed=0, classes=3, **arguments):
    torch.manual_seed(seed)
    return build("resnet10", classes, width=8, **arguments)


def tiny_recipe(**changes):
    """Two epochs of three steps, in the precision that repeats everywhere."""
    small = {"epochs": 2, "batch_size": 16, "pad": 1, "precision": "fp32"}
    return Recipe(**{**small, **changes})


def tiny_work(folder, images=None, net=None, forward=None, **options):
    """A fresh run with its work; recipe fields as keywords."""
    given = ("teacher", "after_step", "origin", "record", "steps_at_once", "save_seconds")
    others = {k: options.pop(k) for k in given if k in options}
    recipe = tiny_recipe(**options)
    run = start(net or tiny_net(recipe.seed), recipe, CPU.device)
    folder.mkdir(exist_ok=True)
    work = Work(
        recipe=recipe,
        training=images or image_set(),
        validation=image_set(24),
        preprocess=PREPROCESS,
        folder=folder,
        processes=CPU,
        forward=forward or run.student,
        **{"origin": {}, "save_seconds": 0.0, **others},
    )
    return run, work


@pytest.fixture
def make_work(tmp_path):
    """Makes a fresh run with its work, in a folder of the test's."""

    def make(folder=None, *arguments, **options):
        return tiny_work(folder or tmp_path / "run", *arguments, **options)

    return make


@pytest.fixture
def make_student():
    """Makes a student over a tiny network in eval mode, where batches do not mix samples."""

    def make(**options):
        return Student(tiny_net(), **options).eval()

    return make


@pytest.fixture
def folder(tmp_path):
    """A data folder with train/ and test/."""
    write_images(tmp_path / "data/train")
    write_images(tmp_path / "data/test", n=4)
    return tmp_path / "data"

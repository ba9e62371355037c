"""A small bundle that knows its classes, and folders of images for it."""

import numpy as np
import torch
from PIL import Image

from model.bundle import save_bundle
from model.network import build
from model.preprocess import Preprocess

CLASSES = ("bright", "dark", "middle")
LEVELS = (150, 50, 100)
PREPROCESS = Preprocess(size=16, mean=(0.4,) * 3, std=(0.2,) * 3)


def write_noisy_images(root, n, classes=CLASSES, seed=0):
    """`root/CLASS/*.png`: images of a brightness that mostly tells the class."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        level = dict(zip(CLASSES, LEVELS, strict=True)).get(name, 200)
        for i in range(n):
            brightness = level + rng.normal(0, 22)
            pixels = brightness + rng.normal(0, 30, (16, 16, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(root / name / f"{i:03}.png", compress_level=1)
    return root


def write_bundle(path, classes=CLASSES):
    """A network of random features whose classifiers are fitted by ridge regression."""
    torch.manual_seed(0)
    net = build("resnet10", len(classes), width=8)
    rng = np.random.default_rng(7)
    ids = rng.integers(0, 3, 256)
    brightness = np.array(LEVELS)[ids] + rng.normal(0, 22, 256)
    noise = rng.normal(0, 30, (256, 16, 16, 3))
    pixels = (brightness[:, None, None, None] + noise).clip(0, 255).astype(np.uint8)
    x = PREPROCESS.normalise(torch.from_numpy(pixels))
    truth = torch.eye(len(classes))[ids]
    with torch.no_grad():
        for norm in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.momentum = 1 - 0.9**30  # one pass does what thirty would
        net.train()(x)
        net.eval()
        for k in range(1, net.exits + 1):
            x = net.features(k, x)
            pooled = net.head(k).pooled(x)
            widened = torch.cat([pooled, torch.ones(len(x), 1)], dim=1)
            # With a ridge, since random features may be dependent, and then anything would fit.
            gram = widened.T @ widened + 0.01 * torch.eye(widened.shape[1])
            fitted = torch.linalg.solve(gram, widened.T @ (4 * truth))
            net.head(k).fc.weight.copy_(fitted[:-1].T)
            net.head(k).fc.bias.copy_(fitted[-1])
    save_bundle(
        path,
        net,
        name="brightness",
        version="1",
        architecture="resnet10",
        arguments={"width": 8},
        classes=classes,
        preprocess=PREPROCESS,
        training={},
    )
    return path

"""The train command: an image folder to a bundle that still wants calibration."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from model.bundle import save_bundle
from model.network import ARCHITECTURES, build
from model.preprocess import Preprocess
from training import data as folders
from training import loop
from training.recipe import Recipe

CIFAR100_MEAN = (0.5071, 0.4866, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)
HELD_OUT = 0.1


def add_command(commands: Any) -> None:
    """Add `train` to the command line."""
    command = commands.add_parser(
        "train",
        help="train a network by self-distillation on an image folder",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/*.png")
    command.add_argument("--out", type=Path, required=True, help="folder for the run")
    command.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="resnet18")
    command.add_argument("--width", type=int, default=64, help="channels of the first stage")
    command.add_argument("--name", default="default", help="the bundle's name")
    command.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    for option in dataclasses.fields(Recipe):
        flag = f"--{option.name.replace('_', '-')}"
        command.add_argument(flag, type=type(option.default), default=option.default)
    command.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> None:
    names = [field.name for field in dataclasses.fields(Recipe)]
    recipe = Recipe(**{name: getattr(arguments, name) for name in names})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preprocess = Preprocess(size=32, mean=CIFAR100_MEAN, std=CIFAR100_STD)
    listing = folders.list_folder(arguments.data / "train")
    kept, held = folders.split_by_hash(listing, HELD_OUT)
    images = folders.load(kept, preprocess)
    validation = folders.load(held, preprocess)
    torch.manual_seed(recipe.seed)
    shape = {"width": arguments.width, "stem": 32}
    net = build(arguments.architecture, len(listing.classes), **shape)
    run = loop.start(net, recipe, device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.resume:
        loop.resume(run, recipe, arguments.out)
    accuracy = loop.fit(run, recipe, images, validation, preprocess, arguments.out)
    save_bundle(
        arguments.out / "bundle",
        net,
        name=arguments.name,
        version="1",
        architecture=arguments.architecture,
        arguments=shape,
        classes=listing.classes,
        preprocess=preprocess,
        training={
            "command": shlex.join(["python", "-m", "training", *sys.argv[1:]]),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "device": device.type,
            "training_images": len(images),
            "held_out_images": len(validation),
            "recipe": dataclasses.asdict(recipe),
            "validation_accuracy": accuracy,
        },
    )
    print(f"wrote {arguments.out / 'bundle'}")

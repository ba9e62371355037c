"""The train command: an image folder to a bundle that still wants calibration."""

from __future__ import annotations

import argparse
import copy
import math
import os
import shlex
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from model.bundle import POLICY, check_name
from model.macs import count_stages
from model.network import MultiExitNet
from model.numerics import Suits, keep_float32_whole, suits
from training import checkpoint, loop
from training.accuracy import Accuracy
from training.bundling import BUNDLE, Finished, printable, write_bundle
from training.captured import Recorder, record_cuda
from training.compiling import compiling
from training.data import ImageSet
from training.distributed import Processes, processes
from training.folder import Folder, Storage, open_folder
from training.interrupt import Interrupted
from training.options import add_options, given
from training.parts import HELD_OUT, check_apart, find_parts
from training.presets import PRESETS, Preset, Shape
from training.pretrained import load_pretrained, load_trained, weights_digest
from training.recipe import PLAIN, Recipe
from training.room import check_disk
from training.run import Run, start
from training.seen import TRAINED, load_digests, shared_digests
from training.shapes import build_net, whole_backbone
from training.teacher import load_teacher
from training.work import Work

AT_ONCE = 2**22
"""Pixels that are augmented together where images live on a card: 4,096 images of 32x32."""
MOST_NAMED = 5
"""Unreadable files; others are counted."""


def add_command(commands: Any) -> None:
    """Add `train` to the command line."""
    presets = "; ".join(f"{name}: {p.help}" for name, p in PRESETS.items())
    command = commands.add_parser(
        "train",
        help="train a network by self-distillation on an image folder",
        description=f"Options change what the preset says. Presets: {presets}.",
    )
    command.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with train/CLASS/*.png and perhaps test/CLASS, or CLASS/*.png to be split",
    )
    command.add_argument("--out", type=Path, required=True, help="folder for the run")
    command.add_argument(
        "--preset", choices=sorted(PRESETS), default="fast", help="what to start from"
    )
    command.add_argument(
        "--name", type=name, help="the bundle's name (default: that of the folder --out)"
    )
    command.add_argument("--bundle-version", type=name, default="1", help="the bundle's version")
    command.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    command.add_argument("--teacher", type=Path, help="a trained bundle that teaches too")
    command.add_argument(
        "--pretrained",
        type=Path,
        help="what to start from: a file with a backbone's weights, or a trained bundle",
    )
    machine = command.add_argument_group("machine")
    machine.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    machine.add_argument("--compile", action="store_true", help="compile the network")
    machine.add_argument(
        "--deterministic", action="store_true", help="on CUDA, repeatable at some cost in speed"
    )
    machine.add_argument(
        "--storage",
        choices=[s.value for s in Storage],
        default=Storage.AUTO.value,
        help="where images live; by itself in memory while they take less than half of it",
    )
    machine.add_argument("--workers", type=count, default=4, help="processes that read images")
    machine.add_argument(
        "--images-per-class", type=int, metavar="N", help="train on at most N images of a class"
    )
    machine.add_argument(
        "--held-out",
        type=held_out,
        default=HELD_OUT,
        metavar="SHARE",
        help="of the training images, for validation and then calibration, whose guarantee wants "
        f"them: above 0, at most {HELD_OUT} (default: {HELD_OUT})",
    )
    add_options(command, Shape, "network")
    add_options(command, Recipe, "recipe (defaults are those of the preset fast)")
    command.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> None:
    chosen = given(arguments, Recipe) | given(arguments, Shape)
    preset = PRESETS[arguments.preset].with_options(chosen)
    with processes(arguments.device) as all_processes:
        _train_with(arguments, preset, all_processes)


def _train_with(arguments: argparse.Namespace, preset: Preset, mine: Processes) -> None:
    recipe, shape = preset.recipe, preset.shape
    _check_options(arguments, recipe, mine)
    _settle(arguments.deterministic)
    parts = find_parts(arguments.data, arguments.images_per_class, arguments.held_out)
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = open_folder(
        parts,
        shape.size,
        shape.crop,
        recipe,
        mine,
        Storage(arguments.storage),
        arguments.workers,
    )
    run, work = _prepare(arguments, preset, mine, data)
    bundle = arguments.out / BUNDLE
    if run.epoch == recipe.epochs and (bundle / POLICY).exists():
        if mine.first:
            print(f"{bundle} is trained and calibrated already: it stays as it is")
        return
    announce(run.net, data, preset, mine)
    warn_of_detour(recipe.precision, mine)
    with compiling(arguments.compile):
        validation, test, unreadable = _fit(run, work, data)
    digests = shared_digests(data.training.files, mine)
    if mine.first:
        done = Finished(
            run=run,
            preset=preset,
            data=data,
            arguments=work.origin["arguments"],
            validation=validation,
            test=test,
            command=command_line(),
            digests=digests,
            device=mine.device,
            unreadable=unreadable,
            processes=mine.count,
            teacher=arguments.teacher and str(arguments.teacher),
            pretrained=arguments.pretrained and str(arguments.pretrained),
        )
        write_bundle(done, bundle, bundle_name(arguments), arguments.bundle_version)
        print(f"wrote {bundle}")


def _check_options(arguments: argparse.Namespace, recipe: Recipe, mine: Processes) -> None:
    if recipe.batch_size % mine.count:
        raise ValueError(f"{mine.count} processes cannot share a batch of {recipe.batch_size}")
    if arguments.teacher:
        recipe.check_teacher()
    for parent in (arguments.pretrained, arguments.teacher):
        if parent:  # what it has seen is wanted at the end, when a damaged record would be too late
            load_digests(parent, TRAINED)
    _check_out(arguments.out, arguments.data)
    bundle_name(arguments)
    if not arguments.resume:
        checkpoint.check_unused(arguments.out)


def _check_out(out: Path, data: Path) -> None:
    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"--out {printable(str(out))} is not UTF-8, all that TensorBoard takes; choose another"
        ) from None
    check_apart(data, out)


def bundle_name(arguments: argparse.Namespace) -> str:
    """What the bundle is called: what was said, or as the run's folder is."""
    if arguments.name:
        return str(arguments.name)
    try:
        return check_name(printable(arguments.out.resolve().name))
    except ValueError as error:
        raise ValueError(f"{error}; say another with --name") from None


def _prepare(
    arguments: argparse.Namespace, preset: Preset, mine: Processes, data: Folder
) -> tuple[Run, Work]:
    """All until the first step, or until that after the checkpoint."""
    recipe, out, device = preset.recipe, arguments.out, mine.device
    net, described = _make_net(arguments.pretrained, preset, data)
    check_parts(net, data.preprocess.size, recipe, mine.count)
    check_disk(out, net, recipe.ema > 0)
    run = start(net, recipe, device)
    classes = data.training.classes
    teacher = load_teacher(arguments.teacher, classes, device) if arguments.teacher else None
    record, steps_at_once = short_steps(data, recipe, mine)
    origin = {
        "architecture": preset.shape.architecture,
        "arguments": described,
        "files": data.digest,
        "training_images": len(data.training),
        "training_files": data.training_digest,
        "preprocess": data.preprocess.model_dump(mode="json"),
        "teacher": teacher and teacher.digest,
        "pretrained": arguments.pretrained and weights_digest(arguments.pretrained),
        "processes": mine.count,
        "steps_at_once": steps_at_once,
    }
    if arguments.resume:
        checkpoint.resume(run, recipe, origin, out)
    forward = mine.wrapped(run.student)
    if teacher and arguments.compile:
        teacher.compile()
    return run, Work(
        recipe=recipe,
        training=data.training,
        validation=data.validation,
        preprocess=data.preprocess,
        folder=out,
        origin=origin,
        processes=mine,
        forward=torch.compile(forward) if arguments.compile else forward,
        class_weights=data.class_weights(recipe.class_weights, device),
        teacher=teacher,
        record=record,
        steps_at_once=steps_at_once,
    )


def short_steps(data: Folder, recipe: Recipe, mine: Processes) -> tuple[Recorder | None, int]:
    """How a step is captured, and how many have their images augmented together.

    On a card steps over small images are so short that each launch counts.
    """
    if mine.device.type != "cuda" or not isinstance(data.training, ImageSet):
        return None, 1
    pixels = recipe.batch_size * data.preprocess.size**2
    return record_cuda if mine.count == 1 else None, max(1, AT_ONCE // pixels)


def _make_net(
    pretrained: Path | None, preset: Preset, data: Folder
) -> tuple[MultiExitNet, dict[str, Any]]:
    """A network, fresh or pretrained, with the arguments that build it again."""
    torch.manual_seed(preset.recipe.seed)
    shape, classes = preset.shape, len(data.training.classes)
    plain = preset.recipe.method == PLAIN
    size = data.preprocess.size
    net, described = build_net(shape, classes, size, plain)
    try:
        count_stages(net, size)
    except RuntimeError as error:
        raise ValueError(
            f"{shape.architecture} cannot take images of {size}x{size}: {error}"
        ) from None
    if pretrained and pretrained.is_dir():
        load_trained(net, pretrained, data.training.classes)
    elif pretrained:
        load_pretrained(net, whole_backbone(shape.architecture, classes, described), pretrained)
    return net, described


def _fit(run: Run, work: Work, data: Folder) -> tuple[Accuracy, Accuracy | None, int]:
    """Train; returns accuracy on held-out and on test images, and how many files were skipped."""
    told = report_unreadable(data, work.processes)
    try:
        validation = loop.fit(run, work)
    except Interrupted:
        report_unreadable(data, work.processes, told)
        raise
    test = None if data.test is None else loop.validate(run, work, data.test)
    return validation, test, len(report_unreadable(data, work.processes, told))


def announce(net: MultiExitNet, data: Folder, preset: Preset, mine: Processes) -> None:
    """Say what is about to be trained on what."""
    if not mine.first:
        return
    parameters = sum(p.numel() for p in net.parameters())
    tested = f", {len(data.test)} to test on" if data.test is not None else ""
    print(
        f"{preset.shape.architecture}, exits: {net.exits}, {parameters / 1e6:.2f} M parameters, "
        f"{len(data.training.classes)} classes of {data.preprocess.size}x{data.preprocess.size}; "
        f"{len(data.training)} images to train on, {len(data.validation)} held out{tested}; "
        f"{mine.count} x {mine.device.type}, {preset.recipe.precision}"
    )


def warn_of_detour(precision: str, mine: Processes, suits: Suits = suits) -> None:
    """Say where bf16 takes longer than another precision: convolutions on CPU up to 20 times as
    long as in fp32.

    Args:
        precision: of the run.
        mine: the first process says it.
        suits: tells where.
    """
    if not mine.first or precision != "bf16" or suits(torch.bfloat16, mine.device):
        return
    if mine.device.type == "cpu":
        which, longer, better = "processor", "many times longer", "fp32"
    else:
        which, longer, better = "card", "longer", "fp16"
    print(
        f"this {which} has no instructions for bf16 and takes {longer} without them: "
        f"--precision {better} is faster here",
        file=sys.stderr,
    )


def report_unreadable(data: Folder, mine: Processes, told: Collection[str] = ()) -> list[str]:
    """Name the first files that a process could not read, and count the rest.

    Args:
        data: of the run.
        mine: every process must come here.
        told: those that were reported before.

    Returns:
        All that could not be read so far.
    """
    known = mine.gather(data.unreadable)
    failures = [f for f in known if f not in told]
    if not failures or not mine.first:
        return known
    print(f"skipped {len(failures)} unreadable files:", file=sys.stderr)
    for failure in failures[:MOST_NAMED]:
        print(f"  {failure}", file=sys.stderr)
    if len(failures) > MOST_NAMED:
        print(f"  and {len(failures) - MOST_NAMED} more", file=sys.stderr)
    return known


def check_parts(net: MultiExitNet, size: int, recipe: Recipe, processes: int) -> None:
    """Raise ValueError where a step would run a single image that the network cannot learn from.

    Batch normalisation wants two values of a channel, and a deep map may have but one an image.
    """
    share = recipe.batch_size // processes
    part = math.ceil(share / recipe.accumulate)
    if min(part, share % part or part) > 1:
        return
    try:
        copy.deepcopy(net).train()(torch.zeros(1, 3, size, size))
    except ValueError:
        raise ValueError(
            f"a batch of {recipe.batch_size} in {recipe.accumulate} parts of each of {processes} "
            "processes leaves a part of one image, which this network cannot normalise; choose "
            "another --batch-size or --accumulate"
        ) from None


def _settle(deterministic: bool) -> None:
    keep_float32_whole()  # of --precision fp32, and of validation
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:  # as torch's notes on reproducibility ask for
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def count(text: str) -> int:
    """Parse a number of processes."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def name(text: str) -> str:
    """Parse a bundle's name or version."""
    try:
        return check_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def held_out(text: str) -> float:
    """Parse the share of training images that is held out."""
    share = float(text)
    if not 0 < share <= HELD_OUT:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most {HELD_OUT}")
    return share


def command_line() -> str:
    """The command as a person would type it."""
    return shlex.join(["python", "-m", "training", *sys.argv[1:]])

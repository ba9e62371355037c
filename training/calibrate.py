"""The calibrate command: a trained bundle to one that may be served."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.bundle import Bundle, load_bundle, save_description, save_policy
from model.image import SUFFIXES
from model.numerics import DTYPES, likely_dtypes, name_of
from model.policy import Measure, OperatingPoint, Policy
from model.quantisation import Ranges
from training import data as folders
from training.calibration import Calibrated, Options, calibrate, search_part
from training.compare import compare_measures
from training.data import DataError, Listing
from training.eight_bits import find_ranges, price
from training.ladder import Method, promise, uncertifiable
from training.logits import cached_logits
from training.outcomes import outcomes_of
from training.parts import HELD_OUT, has_classes, left_to_test, part_of
from training.record import save_record
from training.reliability import exit_errors
from training.room import available_memory, check_memory, images_bytes
from training.seen import Seen, digests_of, marks, save_calibrated, seen_by
from training.timing import stage_seconds

SHOWN_LOSS = 0.01


def add_command(commands: Any) -> None:
    """Add `calibrate` to the command line."""
    command = commands.add_parser(
        "calibrate",
        help="choose thresholds with a guarantee, on images the network never saw",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = Options()
    command.add_argument("bundle", type=Path, help="folder that train wrote")
    command.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with CLASS/*.png; or with train/CLASS/*.png, whose held-out part is taken; "
        "or with images alone, for --method disagreement",
    )
    command.add_argument("--delta", type=share, default=defaults.delta, help="chance of failing")
    command.add_argument(
        "--method", type=Method, choices=list(Method), default=defaults.method, help="what to prove"
    )
    command.add_argument(
        "--measure",
        type=Measure,
        choices=list(Measure),
        default=defaults.measure,
        help="what confidences are made from",
    )
    command.add_argument(
        "--ensemble",
        action=argparse.BooleanOptionalAction,
        default=defaults.ensemble,
        help="answer from all exits passed so far",
    )
    command.add_argument("--mean-macs", type=share, help="add the best point at this cost")
    command.add_argument(
        "--cost", choices=["macs", "measured"], default="macs", help="what the search saves"
    )
    command.add_argument(
        "--search-share",
        type=share,
        default=defaults.search_share,
        help="share of the images that thresholds are chosen on; the rest certifies them",
    )
    command.add_argument("--compare", action="store_true", help="print all measures side by side")
    command.add_argument("--seed", type=int, default=defaults.seed, help="of the images' split")
    command.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        nargs="+",
        default=["auto"],
        help="numerics that it may be served in, each of which every bound is certified for; auto "
        "is what the server's auto may take on this machine; int8 is served only where asked for",
    )
    add_cache(command)
    command.set_defaults(run=_calibrate)


def add_numerics(command: argparse.ArgumentParser) -> None:
    """Options of every command that runs a bundle over a folder of images."""
    command.add_argument(
        "--dtype", choices=["auto", *DTYPES], default="auto", help="numerics, as it will serve"
    )
    add_cache(command)


def add_cache(command: argparse.ArgumentParser) -> None:
    """The option that says where logits are kept."""
    command.add_argument("--cache", type=Path, help="folder for logits; by default beside BUNDLE")


def _calibrate(arguments: argparse.Namespace) -> None:
    labelled = is_labelled(arguments.data)
    if not labelled:
        check_options(arguments)
    bundle = load_bundle(arguments.bundle, with_policy=not labelled)
    seen = seen_by(bundle)
    listing = calibration_listing(arguments.data, seen)
    if labelled:
        check_classes(bundle, listing.classes)
    dtypes = certified_dtypes(arguments.dtype)
    images = load_images(bundle, listing)
    class_ids = labels_of(images) if labelled else None
    names = ("measure", "ensemble", "method", "delta", "search_share", "mean_macs", "seed")
    options = Options(**{name: getattr(arguments, name) for name in names})
    found = search_part(len(images), options)
    ranges = find_ranges(bundle, images, found) if torch.int8 in dtypes else None
    every = _logits_of(bundle, images, dtypes, cache_folder(arguments), ranges)
    logits, *others = (every[dtype] for dtype in dtypes)
    costs = stage_seconds(bundle, dtypes[0]) if arguments.cost == "measured" else None
    if arguments.compare and class_ids is not None:
        print(compare_measures(bundle, logits, class_ids, options))
    result = calibrate(bundle, logits, class_ids, options, costs, others)
    policy = result.policy.model_copy(update={"dtypes": tuple(map(name_of, dtypes))})
    if ranges is not None:
        policy = _with_int8(policy, ranges, every, class_ids, result.tested)
    # These take long, and a policy must not be there without them.
    digests = digests_of([*images.files, *images.copies])
    save_calibrated(seen, digests, labelled)
    save_policy(bundle.path, policy)
    save_record(bundle, result)
    forget_accuracy(bundle)
    _tell(bundle, replace(result, policy=policy), logits, class_ids)


def _logits_of(
    bundle: Bundle,
    images: folders.ImageSet,
    dtypes: Sequence[torch.dtype],
    cache: Path,
    ranges: Ranges | None,
) -> dict[torch.dtype, Tensor]:
    """The images' logits in each of the numerics, with int8 in those it is priced against too."""
    needed = [*dtypes, torch.float32] if torch.int8 in dtypes else dtypes
    return {
        dtype: cached_logits(bundle, images, dtype, cache, ranges)
        for dtype in dict.fromkeys(needed)
    }


def _tell(bundle: Bundle, result: Calibrated, logits: Tensor, class_ids: Tensor | None) -> None:
    """Print what a calibration did, and what is left to do."""
    for line in summary(result):
        print(line)
    if class_ids is not None:
        tested = result.tested
        for line in reliability_lines(result.policy, logits[tested], class_ids[tested]):
            print(line)
    print(
        "what it does on test images is not known, and any report of it is of another calibration; "
        f"run: python -m training evaluate {bundle.path} --data DIR"
    )


def _with_int8(
    policy: Policy,
    ranges: Ranges,
    logits: Mapping[torch.dtype, Tensor],
    class_ids: Tensor | None,
    tested: np.ndarray,
) -> Policy:
    """The policy with what int8 needs, and what it costs on the images that certified it."""
    exact, rounded = (logits[dtype][tested] for dtype in (torch.float32, torch.int8))
    labels = None if class_ids is None else class_ids[tested]
    priced = price(ranges, exact, rounded, labels, policy)
    return policy.model_copy(update={"quantisation": priced})


def forget_accuracy(bundle: Bundle) -> None:
    """Take the exits' accuracy as served out of bundle.json: it was measured with other policies.

    How accurate each is by itself depends on the weights alone.
    """
    description = bundle.description
    exits = tuple(e.model_copy(update={"accuracy": None}) for e in description.exits)
    save_description(bundle.path, description.model_copy(update={"exits": exits}))


def chosen_dtype(name: str) -> torch.dtype:
    """The numerics of this name; `auto` takes those that any server of this device has."""
    return certified_dtypes([name])[0]


def certified_dtypes(names: Sequence[str]) -> tuple[torch.dtype, ...]:
    """The numerics of these names, without repetition; `auto` stands for all likely ones."""
    likely = likely_dtypes("cuda" if torch.cuda.is_available() else "cpu")
    given = [likely if name == "auto" else (DTYPES[name],) for name in names]
    return tuple(dict.fromkeys(dtype for some in given for dtype in some))


def is_labelled(root: Path) -> bool:
    """Whether a data folder is to hold images by class, rather than images alone."""
    return part_of(root, "train") is not None or not _bare_images(root)


def calibration_listing(root: Path, seen: Seen) -> Listing:
    """The images to calibrate on, none of which the bundle was trained on.

    That is what training held out of `root/train`, or of a `root/CLASS` of which it took a part; of
    another `root/CLASS` that holds images it was trained on, what `evaluate` does not take; all of
    any other `root/CLASS`; without any class, the images in `root` itself. Where only a part is
    taken, that is said.

    Raises:
        DataError: there are none.
    """
    trained = part_of(root, "train")
    if trained is None and (files := _bare_images(root)):
        bare = Listing((), files, (0,) * len(files))
        return seen.left_by_confidences(seen.left_by_training(bare, known=False))
    listing = folders.list_folder(trained or root)
    named = seen.names(listing)
    # Of a train folder a part is held out anyway; reading all of it would only tell what to say.
    known = named or (trained is None and seen.knows(listing))
    if trained or named:
        chosen, what = folders.split_by_hash(listing, HELD_OUT)[1], "training holds out"
    elif known:
        chosen, what = _untested(listing), "are not kept to be tested on"
    else:
        return seen.left_by_training(listing, known=False)
    if not len(chosen):
        raise DataError(f"{root} has too few images a class to hold any out; take more")
    tqdm.write(f"of {len(listing)} images in {trained or root} took the {len(chosen)} that {what}")
    return seen.left_by_training(chosen, known)


def _untested(listing: Listing) -> Listing:
    """The images that are not kept to be tested on, nor copies of such."""
    tested = digests_of(left_to_test(listing).files)
    return listing.pick(np.flatnonzero(~marks(listing, tested)).tolist())


def _bare_images(root: Path) -> tuple[Path, ...]:
    """The images right in a folder that holds no classes."""
    if not root.is_dir() or has_classes(root):
        return ()
    return tuple(sorted(p for p in folders.visible(root) if p.suffix.lower() in SUFFIXES))


def load_images(bundle: Bundle, listing: Listing) -> folders.ImageSet:
    """Read images through the bundle's preprocess, saying which cannot be read or are copies.

    What is said of images holds for independent ones. A copy is none: on both sides of a split it
    would certify what it had chosen, on one side it would count for two.

    Raises:
        DataError: memory cannot hold them, or none can be read.
    """
    wanted = images_bytes(len(listing), bundle.description.preprocess.size)
    check_memory(wanted, available_memory(), "take fewer")
    images = folders.load(listing, bundle.description.preprocess, keep_copies=False)
    if images.unreadable:
        tqdm.write(f"skipped {len(images.unreadable)} files; the first: {images.unreadable[0]}")
    if images.copies:
        tqdm.write(
            f"left out {len(images.copies)} of {len(listing)} images, which have the same pixels "
            f"as others; the first: {images.copies[0]}"
        )
    return images


def check_classes(bundle: Bundle, classes: Sequence[str]) -> None:
    """Raise DataError unless the data's classes are the bundle's, in its order, and several."""
    expected = bundle.description.classes
    if len(classes) == 1:
        raise DataError(
            f"there is one class only, {classes[0]}, so nothing can be told of answers; "
            f"take images of all {len(expected)} classes of the bundle"
        )
    if tuple(classes) != expected:
        odd = sorted(set(classes) ^ set(expected))[:3]
        raise DataError(
            f"the data has {len(classes)} classes, the bundle {len(expected)}, and they differ "
            f"(in {', '.join(odd) or 'order'}); take images of the classes it was trained on"
        )


def labels_of(images: folders.ImageSet) -> Tensor:
    """The class ids; warns of classes without an image, of which bounds will say nothing."""
    known = zip(images.classes, images.readable_classes(), strict=True)
    missing = [name for name, there in known if not there]
    if missing:
        print(
            f"{len(missing)} of {len(images.classes)} classes have no image to calibrate on "
            f"({', '.join(missing[:3])}{', …' * (len(missing) > 3)}): the bounds hold for images "
            "as these are, and say nothing of those classes",
            file=sys.stderr,
        )
    return images.class_ids


def check_options(arguments: argparse.Namespace) -> None:
    """Raise DataError where images without labels are given with options that need them."""
    if arguments.method is not Method.DISAGREEMENT:
        raise DataError("images without labels can only be calibrated with --method disagreement")
    defaults = Options()
    needy = {
        f"--measure {arguments.measure}": arguments.measure != defaults.measure,
        "--no-ensemble": arguments.ensemble != defaults.ensemble,
        "--compare": arguments.compare,
    }
    given = [option for option, is_given in needy.items() if is_given]
    if given:
        raise DataError(
            f"images without labels leave confidences as they are: drop {' and '.join(given)}"
        )


def cache_folder(arguments: argparse.Namespace) -> Path:
    """Where logits are kept."""
    return arguments.cache or arguments.bundle.resolve().parent / ".cache"


def summary(result: Calibrated) -> Iterator[str]:
    """The calibration in lines for people."""
    policy, certifier = result.policy, result.certifier
    n, proved = len(certifier.outcomes), certifier.in_probability
    yield (
        f"{policy.calibration_images} images: thresholds chosen on "
        f"{policy.calibration_images - n}, {'certified' if proved else 'tested'} on {n} "
        f"({policy.method})" + f" in {' and '.join(policy.dtypes)}" * bool(policy.dtypes)
    )
    yield f"bounds hold {promise(policy.method, policy.delta)}"
    if policy.quantisation:
        yield (
            f"int8 loses {policy.quantisation.measured_accuracy_loss:.2%} at full depth against "
            f"float32, at most {policy.quantisation.accuracy_loss_bound:.2%}; the losses below "
            "come on top"
        )
    if not result.labelled:
        yield (
            f"without labels: confidences are those of the policy there was ({policy.measure}), "
            "and measured is the share answered otherwise than by the full network"
        )
    yield from table(policy.operating_points)
    if policy.exits == 1:
        yield "there is one exit, so nothing is skipped and nothing lost"
        return
    for bound, needed in uncertifiable(certifier, policy.operating_points):
        in_all = math.ceil(needed * policy.calibration_images / n)
        promised = "certified" if proved else "kept on average"
        yield f"a loss of {bound:.2%} cannot be {promised}, so the full network runs: " + (
            f"it takes at least {in_all} images, {needed} of them to certify on"
            + ", unless early answers gain more than they lose" * (policy.method == Method.PAIRED)
            if needed > n
            else f"the most careful thresholds tried lost too much on these {n} images"
        )


def reliability_lines(policy: Policy, logits: Tensor, class_ids: Tensor) -> Iterator[str]:
    """Calibration errors of every exit, at the operating point for a loss of one point."""
    outcomes = outcomes_of(logits, class_ids, policy.calibrations, policy.measure)
    taken = outcomes.taken(policy.point_for(SHOWN_LOSS).thresholds)
    for k, e in enumerate(exit_errors(outcomes, logits, class_ids, taken), start=1):
        leaving = "" if e.leaving is None else f", {e.leaving:.2%} among those that leave there"
        yield f"exit {k}: calibration error {e.before:.2%} as trained, {e.after:.2%} now{leaving}"


def table(points: Sequence[OperatingPoint]) -> Iterator[str]:
    """Operating points for people."""
    yield "loss at most   measured   mean MACs   leaving at each exit"
    for p in points:
        leaving = " ".join(f"{s:6.1%}" for s in p.exit_shares)
        yield (
            f"{p.max_accuracy_loss:12.2%} {p.measured_accuracy_loss:10.2%} "
            f"{p.mean_macs:11.1%}   {leaving}"
        )


def share(text: str) -> float:
    """Parse a number between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value

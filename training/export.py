"""The export command: a bundle cut at an exit, or a network for other runtimes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.bundle import (
    WEIGHTS,
    Bundle,
    BundleError,
    Exit,
    load_bundle,
    save_bundle,
    save_description,
    save_policy,
)
from model.macs import count_stages, cumulative_macs, cumulative_parameters
from model.network import MultiExitNet, build, build_from
from model.numerics import name_of
from model.policy import Calibration, OperatingPoint, Policy
from training.programs import FORMATS, write_programs
from training.seen import hand_on


def add_command(commands: Any) -> None:
    """Add `export` to the command line."""
    command = commands.add_parser(
        "export",
        help="cut a bundle at an exit, or write it for other runtimes",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("bundle", type=Path, help="a calibrated bundle")
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--exit", type=int, help="cut here and drop all other heads")
    command.add_argument(
        "--format", choices=["bundle", *FORMATS], default="bundle", help="what to write"
    )
    command.add_argument(
        "--per-stage", action="store_true", help="one file for each stage (onnx and pt2)"
    )
    command.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    if arguments.out.resolve() == arguments.bundle.resolve():
        raise BundleError(f"{arguments.out} is the bundle itself; name another folder with --out")
    bundle = load_bundle(arguments.bundle)
    net = bundle.net if arguments.exit is None else cut(bundle, arguments.exit)
    if arguments.format != "bundle":
        size = bundle.description.preprocess.size
        written = write_programs(net, size, arguments.format, arguments.per_stage, arguments.out)
        for file, difference in written:
            megabytes = file.stat().st_size / 1e6
            print(f"wrote {file}, {megabytes:.1f} MB; differs from torch by {difference:.1e}")
        if arguments.exit is not None:
            print(comparison(bundle, cut_exit(bundle, arguments.exit, net), arguments.exit))
        return
    if arguments.per_stage:
        raise BundleError("--per-stage is for onnx and pt2: say which with --format")
    if arguments.exit is None:
        raise BundleError("say where to cut with --exit, or what to write with --format")
    save_cut(bundle, arguments.exit, net, arguments.out)
    small = load_bundle(arguments.out)
    sizes = [(b.path / WEIGHTS).stat().st_size for b in (bundle, small)]
    print(comparison(bundle, small.description.exits[-1], arguments.exit, sizes))
    print(f"wrote {arguments.out}")


def cut(bundle: Bundle, exit: int) -> MultiExitNet:
    """The bundle's network up to `exit`, with that head alone.

    Raises:
        BundleError: the network has no such exit.
    """
    if not 1 <= exit <= bundle.net.exits:
        raise BundleError(f"{bundle.path} has exits 1 to {bundle.net.exits}, not {exit}")
    description = bundle.description
    arguments = description.arguments | {"keep": [bundle.net.kept[exit - 1]]}
    shape = (description.architecture, len(description.classes))
    with torch.device("meta"):
        names = build(*shape, **arguments).state_dict().keys()
    state = {k: v for k, v in bundle.net.state_dict().items() if k in names}
    return build_from(state, *shape, **arguments)


def save_cut(bundle: Bundle, exit: int, net: MultiExitNet, out: Path) -> None:
    """Write the cut network as a bundle, with a policy where the original has one."""
    description = bundle.description
    provenance = {"cut_at_exit": exit, "cut_from_weights_sha256": description.weights_sha256}
    written = save_bundle(
        out,
        net,
        name=f"{description.name}-exit{exit}",
        version=description.version,
        architecture=description.architecture,
        arguments=description.arguments | {"keep": list(net.kept)},
        classes=description.classes,
        preprocess=description.preprocess,
        training=description.training | provenance,
    )
    exits = (cut_exit(bundle, exit, net),)
    save_description(out, written.model_copy(update={"exits": exits}))
    hand_on(bundle.path, out)
    if bundle.policy is not None:
        save_policy(out, cut_policy(bundle.policy, exit, written.weights_sha256))


def cut_exit(bundle: Bundle, exit: int, net: MultiExitNet) -> Exit:
    """What the only exit of the cut network costs, with the accuracy it had alone."""
    costs = count_stages(net, bundle.description.preprocess.size)
    macs, parameters = cumulative_macs(costs)[-1], cumulative_parameters(costs)[-1]
    alone = bundle.description.exits[exit - 1].alone
    return Exit(exit=1, macs=macs, parameters=parameters, accuracy=alone, alone=alone)


def cut_policy(policy: Policy, exit: int, weights_sha256: str) -> Policy:
    """The policy of one exit by itself: always answer, at its own temperature."""
    original = policy.calibrations[exit - 1]
    temperature = original.alone or original.temperature
    whole = OperatingPoint(
        max_accuracy_loss=0,
        thresholds=(),
        certified=True,
        measured_accuracy_loss=0,
        mean_macs=1,
        exit_shares=(1.0,),
    )
    return Policy(
        weights_sha256=weights_sha256,
        method=f"cut at exit {exit}; nothing is skipped, so nothing is lost",
        delta=policy.delta,
        calibration_images=policy.calibration_images,
        dtypes=tuple(d for d in policy.dtypes if d != name_of(torch.int8)),
        calibrations=(Calibration(temperature=temperature, alone=temperature),),
        operating_points=(whole,),
    )


def comparison(full: Bundle, after: Exit, exit: int, sizes: Sequence[int] = ()) -> str:
    """What is left of a bundle's network that is cut at an exit, for people.

    Args:
        full: the bundle.
        after: the exit that is left.
        exit: where it was.
        sizes: of the weights before and after, in bytes, where both are stored alike.
    """
    before = full.description.exits[-1]
    rows = [("weights, MB", *(size / 1e6 for size in sizes))] if sizes else []
    rows += [
        ("parameters, M", before.parameters / 1e6, after.parameters / 1e6),
        ("MACs, M", before.macs / 1e6, after.macs / 1e6),
    ]
    if before.accuracy is not None and after.accuracy is not None:
        rows.append(("test accuracy, %", 100 * before.accuracy, 100 * after.accuracy))
    lines = [f"{'':18}{'full':>8}{f'exit {exit}':>8}"]
    lines += [f"{name:18}{a:8.2f}{b:8.2f}" for name, a, b in rows]
    return "\n".join(lines)

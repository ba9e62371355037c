"""The command line: python -m deploy.bench stages, threads, loop, memory, loader or engine."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deploy.bench import engine, loader, loop, memory, stages, threads
from deploy.files import need_writable
from deploy.loadtest.samples import read_samples
from deploy.options import count, positive
from model.architectures import ARCHITECTURES
from model.bundle import Bundle, BundleError, load_servable
from model.cores import usable_cores
from model.numerics import keep_float32_whole
from server.compiled import openvino
from server.numerics import choose_dtype
from server.served import device_of
from server.settings import Settings

HOURLY_RATE = 100
"""Requests a second of the hour that `memory` stands for."""


def main(argv: list[str] | None = None) -> int:
    """Measure, print what was seen; a failure is one sentence and exit status 2."""
    arguments = _parser().parse_args(argv)
    try:
        need_writable(arguments.json, getattr(arguments, "plot", None))
        status: int = arguments.measure(arguments)
    except (BundleError, ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


def _stages(arguments: argparse.Namespace) -> int:
    if arguments.clock == "cpu" and arguments.threads != 1:
        raise ValueError("--clock cpu counts one thread, so --threads must be 1")
    _prepare_to_compile()
    bundle = load_servable(arguments.bundle)
    clock = stages.CLOCKS[arguments.clock]
    rows = stages.measure(
        bundle,
        arguments.batches,
        arguments.threads,
        arguments.seconds,
        clock,
        arguments.cache_dir,
    )
    asked = {"threads": arguments.threads, "clock": arguments.clock}
    _write(arguments.json, [{**row.as_dict(), **asked} for row in rows])
    print(stages.table(rows))
    return 0


def _threads(arguments: argparse.Namespace) -> int:
    if arguments.way == "compiled":
        _prepare_to_compile()
    load_servable(arguments.bundle)  # else every setup would say that it cannot
    cases = [
        threads.Case(arguments.bundle, arguments.way, dtype, batch, arguments.cache_dir)
        for dtype, batch in itertools.product(arguments.dtypes, arguments.batches)
    ]
    rows = threads.measure(cases, arguments.cores, arguments.seconds)
    _write(arguments.json, [row.as_dict() for row in rows])
    print(threads.table(rows))
    return 0


def _loop(arguments: argparse.Namespace) -> int:
    samples = read_samples(arguments.images)
    settings = Settings(bundle=arguments.bundle, compile="off", log_level=arguments.log_level)
    rows = loop.measure(settings, samples, arguments.seconds)
    _write(arguments.json, [row.as_dict() for row in rows])
    print(loop.table(rows))
    return 0


def _memory(arguments: argparse.Namespace) -> int:
    """Status 1 where memory grew by more than is allowed, or a request failed."""
    samples = read_samples(arguments.images)
    crowd = memory.Crowd(arguments.url, samples, arguments.requests)
    seen = asyncio.run(crowd.run(arguments.clients))
    _write(arguments.json, seen.as_dict())
    if arguments.plot:
        memory.plot(seen, arguments.plot)
    flat = seen.growth_mib <= arguments.most_mib
    failed = sum(n for status, n in seen.statuses.items() if status not in memory.EXPECTED)
    print(
        f"{seen.looks[-1].requests} requests in {seen.seconds:.0f} s; {seen.looks[0].mib:.0f} MiB "
        f"at the start, {seen.looks[-1].mib:.0f} at the end\n"
        f"the last half grew by {seen.growth_mib:+.2f} MiB, {seen.bytes_per_request:+.1f} bytes a "
        f"request: {'flat' if flat else 'NOT flat'} (allowed: {arguments.most_mib:g} MiB)\n"
        f"by status: {seen.statuses}"
    )
    return 0 if flat and not failed and "200" in seen.statuses else 1


def _loader(arguments: argparse.Namespace) -> int:
    rows = loader.measure(
        arguments.architecture,
        arguments.width,
        arguments.workers,
        arguments.batch,
        arguments.steps,
        loader.authors_transform(),
        device_of("auto"),
    )
    _write(arguments.json, [row.as_dict() for row in rows])
    print(loader.table(rows))
    return 0


def _engine(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="offramp-") as scratch:
        bundle = _bundle(arguments, Path(scratch))
        device = device_of(arguments.device)
        if device.type == "cuda":
            keep_float32_whole()
        torch.backends.cudnn.benchmark = arguments.autotune
        dtype = choose_dtype(arguments.dtype, bundle, device)
        largest = max(arguments.batches)
        print(f"warming up for batches up to {largest}", file=sys.stderr, flush=True)
        ready = engine.Ready(bundle, device, dtype, largest)
        figures = list(engine.measure(ready, arguments.batches, arguments.seconds))
    _write(arguments.json, {"on": engine.title(ready), "figures": [f.as_dict() for f in figures]})
    print(f"{engine.title(ready)}\n\n{engine.table(figures)}")
    return 0


def _bundle(arguments: argparse.Namespace, folder: Path) -> Bundle:
    if arguments.bundle:
        return load_servable(arguments.bundle)
    torch.manual_seed(0)
    return engine.random_bundle(folder, arguments.architecture, arguments.width, arguments.classes)


def _prepare_to_compile() -> None:
    warnings.filterwarnings("ignore")  # torch's own
    openvino()


def _write(file: Path | None, figures: Any) -> None:
    if file:
        file.write_text(json.dumps(figures, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, measure: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.set_defaults(measure=measure)
        command.add_argument("--json", type=Path, help="write every figure here")
        return command

    def add_network(command: argparse.ArgumentParser, batches: Sequence[int]) -> None:
        command.add_argument(
            "--bundle", type=Path, default=Path("model/default"), help="what to run"
        )
        command.add_argument(
            "--batches", type=count, nargs="+", default=batches, help="batch sizes"
        )
        command.add_argument(
            "--seconds", type=positive, default=4.0, help="length of each measurement"
        )
        command.add_argument(
            "--cache-dir",
            type=Path,
            default=Settings.model_fields["cache_dir"].default,
            help="where a server keeps compiled stages, which are compiled if they are not there",
        )

    one = add("stages", _stages, "what it costs to run a network stage by stage, not at once")
    add_network(one, [1, 8])
    one.add_argument("--threads", type=count, default=1, help="inside one operation")
    one.add_argument(
        "--clock",
        choices=stages.CLOCKS,
        default="wall",
        help="cpu leaves out what other programs take of the core",
    )

    one = add("threads", _threads, "threads inside an operation, against stage batches at once")
    add_network(one, [1, 8, 32])
    one.add_argument("--cores", type=count, default=usable_cores(), help="to be shared out evenly")
    one.add_argument("--way", choices=stages.WAYS, default="compiled", help="how stages run")
    one.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float32", "bfloat16"),
        default=["float32", "bfloat16"],
        help="numerics",
    )

    one = add("loop", _loop, "what a request costs the event loop, beside engine and network")
    one.add_argument("--bundle", type=Path, default=Path("model/default"), help="to answer from")
    one.add_argument("--images", type=Path, required=True, help="folder or tar of CLASS/*")
    one.add_argument("--seconds", type=positive, default=4.0, help="length of each measurement")
    one.add_argument(
        "--log-level", choices=("info", "warning"), default="info", help="with log lines or without"
    )

    one = add("memory", _memory, "whether a running server's memory stays flat")
    one.add_argument("url", help="http://host:port of the server")
    one.add_argument("--images", type=Path, required=True, help="folder or tar of CLASS/*")
    one.add_argument(
        "--requests",
        type=count,
        default=HOURLY_RATE * 3600,
        help=f"how many; an hour of {HOURLY_RATE} a second, sent as fast as they are answered",
    )
    one.add_argument("--clients", type=count, default=32, help="at the same time")
    one.add_argument("--most-mib", type=float, default=8.0, help="growth allowed in the last half")
    one.add_argument("--plot", type=Path, help="write the picture here (PNG)")

    one = add("loader", _loader, "how fast the usual loop trains, with a data loader's workers")
    one.add_argument(
        "--architecture", choices=sorted(ARCHITECTURES), default="resnet18", help="what to train"
    )
    one.add_argument("--width", type=count, default=64, help="channels of its first stage")
    one.add_argument("--workers", type=count, nargs="+", default=[4, 16], help="that augment")
    one.add_argument("--batch", type=count, default=128, help="images a step")
    one.add_argument("--steps", type=count, default=200, help="that are timed")

    one = add("engine", _engine, "what the engine's runner makes of a device")
    one.add_argument("--bundle", type=Path, help="what to run, in place of random weights")
    one.add_argument("--architecture", default="resnet18", help="of a network with random weights")
    one.add_argument("--width", type=count, default=64, help="its first stage's channels")
    one.add_argument("--classes", type=count, default=100, help="how many it tells apart")
    one.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where")
    one.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="numerics, chosen as a server does",
    )
    one.add_argument(
        "--batches",
        type=count,
        nargs="+",
        default=[8, 16, 32, 64, 128],
        help="sizes that the device is saturated with",
    )
    one.add_argument("--seconds", type=positive, default=0.6, help="length of each measurement")
    one.add_argument(
        "--autotune",
        action="store_true",
        help="have cuDNN try all its ways, which a server does not",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

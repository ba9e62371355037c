"""The command line: python -m deploy.peers --images DIR.

Starts each server in turn with the same bundle, each peer in a virtual environment of its own,
loads it with so many clients, and prints one table. A peer that cannot be installed or does not
answer is a row that says so.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deploy.loadtest.client import Client
from deploy.loadtest.load import closed_loop
from deploy.loadtest.samples import Sample, read_samples
from deploy.loadtest.summary import summarise

ROOT = Path(__file__).parents[2]
CLIENTS = (1, 8, 32)
PORT = 8791
START_SECONDS = 600.0
STOP_SECONDS = 15.0
COMMON = (f"torch=={torch.__version__.partition('+')[0]}", "numpy", "pillow", "safetensors")
Row = dict[str, Any]


class PeerError(Exception):
    """A peer that cannot be measured; the message says why."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One server to compare."""

    name: str
    command: tuple[str, ...]
    """After the interpreter, with `{port}` and `{bundle}`."""
    packages: tuple[str, ...] = ()
    """What its environment needs beside torch; nothing where it runs in Offramp's own."""
    query: str = ""
    wrap: Callable[[bytes], bytes] = bytes
    """From an encoded image to what is posted."""
    content_type: str = "application/octet-stream"


def offramp(name: str, *flags: str, query: str = "") -> Peer:
    """The server itself, with these flags."""
    command = ("-m", "server", "--bundle", "{bundle}", "--port", "{port}", *flags)
    return Peer(name, (*command, "--compile", "require", "--log-level", "warning"), query=query)


PEERS = (
    Peer("FastAPI", ("-m", "deploy.peers.plain")),
    Peer(
        "LitServe",
        ("-m", "deploy.peers.litserve_server"),
        ("litserve", "pydantic"),
        wrap=lambda data: b'{"image": "%s"}' % base64.b64encode(data),
        content_type="application/json",
    ),
    Peer(
        "mosec",
        ("-m", "deploy.peers.mosec_server", "--port", "{port}"),
        ("mosec", "pydantic"),
    ),
    Peer(
        "BentoML",
        ("-m", "bentoml", "serve", "deploy.peers.bentoml_server:Front", "--port", "{port}"),
        ("bentoml", "pydantic"),
    ),
    offramp("Offramp, every image at full depth", query="?threshold=1"),
    offramp("Offramp"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every server, print one table."""
    arguments = _parser().parse_args(argv)
    try:
        samples = read_samples(arguments.images, 500)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [
        _measure(peer, arguments, samples)
        for peer in PEERS
        if arguments.only is None or peer.name in arguments.only
    ]
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _measure(peer: Peer, arguments: argparse.Namespace, samples: list[Sample]) -> Row:
    print(f"{peer.name}…", file=sys.stderr)
    samples = [Sample(peer.wrap(sample.data), sample.label) for sample in samples]
    try:
        python = _environment(peer, arguments.environments.expanduser())
        with _started(peer, python, arguments.bundle.resolve(), arguments.quiet_seconds):
            by_clients = {
                str(n): asyncio.run(_load(peer, samples, n, arguments.seconds)) for n in CLIENTS
            }
    except (PeerError, OSError) as error:
        return {"name": peer.name, "failed": str(error)}
    return {"name": peer.name, "clients": by_clients}


async def _load(peer: Peer, samples: list[Sample], clients: int, seconds: float) -> Row:
    url = f"http://127.0.0.1:{PORT}/classify{peer.query}"
    client = Client(url, {"Content-Type": peer.content_type})
    await closed_loop(client, samples, clients, 1.0)
    results = await closed_loop(client, samples, clients, seconds, seed=1)
    await client.close()
    return summarise(results, 60.0)


def _environment(peer: Peer, folder: Path) -> str:
    if not peer.packages:
        return sys.executable
    home = folder / peer.packages[0]
    python = home / "bin/python"
    if not (home / "complete").exists():
        venv.create(home, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "-q", *COMMON, *peer.packages]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().rpartition("\n")[2]
            raise PeerError(f"cannot be installed: {said}")
        (home / "complete").touch()
    return str(python)


@contextmanager
def _started(peer: Peer, python: str, bundle: Path, quiet: float) -> Iterator[None]:
    words = [word.format(port=PORT, bundle=bundle) for word in peer.command]
    environment = {**os.environ, "PEER_BUNDLE": str(bundle), "PEER_PORT": str(PORT)}
    process = subprocess.Popen(
        [python, *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait(process)
        time.sleep(quiet)
        yield
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Kindly first, since some peers' workers have process groups of their own."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait(process: subprocess.Popen[bytes]) -> None:
    """Until something answers, be it that there is no image in the request."""
    ends = time.monotonic() + START_SECONDS
    while time.monotonic() < ends:
        if process.poll() is not None:
            raise PeerError(f"ended with status {process.returncode} while starting")
        status, _ = asyncio.run(_knock())
        if status not in (0, 503):
            return
        time.sleep(0.5)
    raise PeerError(f"did not answer within {START_SECONDS:g} s")


async def _knock() -> tuple[int, bytes]:
    client = Client(f"http://127.0.0.1:{PORT}/classify")
    try:
        return await asyncio.wait_for(client.post(b"?"), 10)
    except TimeoutError:
        return 0, b""
    finally:
        await client.close()


def table(rows: Sequence[Row]) -> str:
    """The servers as Markdown."""
    columns = [f"{n} client{'s' * (n > 1)}" for n in CLIENTS]
    lines = [
        f"| server | {' | '.join(f'{c}, images/s (p50, p99 in ms)' for c in columns)} | accuracy |",
        "| --- " * (2 + len(CLIENTS)) + "|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['name']} | {row['failed']}" + " |" * (1 + len(CLIENTS)))
            continue
        said = [row["clients"][str(n)] for n in CLIENTS]
        lines.append(f"| {row['name']} | {' | '.join(map(_cell, said))} | {_accuracy(said[-1])} |")
    return "\n".join(lines)


def _cell(summary: Row) -> str:
    latency = summary["latency_ms"]
    failed = 1 - summary["in_time_share"]
    said = f"{summary['answered_per_second']:.0f}"
    if latency:
        said += f" ({latency['p50']:.1f}, {latency['p99']:.1f})"
    return said + (f", {failed:.1%} failed" if failed else "")


def _accuracy(summary: Row) -> str:
    accuracy = summary["accuracy_of_answers"]
    return "-" if accuracy is None else f"{accuracy:.1%}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.peers",
        description="Compare Offramp with other servers of the same network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--images", type=Path, required=True, help="folder or tar of CLASS/*")
    parser.add_argument("--bundle", type=Path, default=Path("model/default"), help="what to serve")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument(
        "--quiet-seconds", type=float, default=1.0, help="between a server's start and its load"
    )
    parser.add_argument(
        "--environments",
        type=Path,
        default=Path("~/.cache/offramp/peers"),
        help="where virtual environments are made and kept",
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="a server; may be repeated")
    parser.add_argument("--json", type=Path, help="write every figure here")
    return parser


if __name__ == "__main__":
    sys.exit(main())

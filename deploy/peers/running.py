"""A peer's environment, its start, its end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import torch

from deploy.loadtest.client import Client
from deploy.loadtest.samples import Sample
from deploy.peers.peer import Peer, PeerError

ROOT = Path(__file__).parents[2]
PORT = 8791
START_SECONDS = 300.0
STOP_SECONDS = 15.0
KNOCK_SECONDS = 10.0
COMMON = (f"torch=={torch.__version__.partition('+')[0]}", "numpy", "pillow", "safetensors")
MARK = "PEER_RUN"
"""In the environment of every process of a peer, so that none outlives it."""


def client_of(peer: Peer, *query: str) -> Client:
    """A client that posts what the peer wants."""
    return Client(peer.url(PORT, *query), {"Content-Type": peer.content_type})


def _environment(home: Path) -> None:
    venv.create(home, with_pip=True, clear=True)


def prepare(peer: Peer, folder: Path, create: Callable[[Path], None] = _environment) -> str:
    """Make the peer's virtual environment unless it is there; returns its interpreter.

    Args:
        peer: the server.
        folder: where environments are kept.
        create: makes an empty environment with pip.

    Raises:
        PeerError: it cannot be installed.
    """
    if not peer.packages:
        return sys.executable
    home = folder / re.split(r"\W", peer.packages[0])[0]
    python, complete = home / "bin/python", home / "complete"
    wanted = "\n".join((*COMMON, *peer.packages))
    if not complete.exists() or complete.read_text() != wanted:
        try:
            create(home)
        except subprocess.CalledProcessError as error:  # most often a Python without ensurepip
            said = _last_line((error.output or b"").decode(errors="replace"))
            raise PeerError(f"cannot be installed: no virtual environment: {said}") from None
        install = [str(python), "-m", "pip", "install", "-q", *wanted.split("\n")]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            raise PeerError(f"cannot be installed: {_last_line(done.stderr)}")
        complete.write_text(wanted)
    return str(python)


@contextmanager
def started(peer: Peer, python: str, bundle: Path, sample: Sample) -> Iterator[int]:
    """Start the peer, wait until it answers, give the id of its first process; end it at last.

    Args:
        sample: what it must answer, as it wants it.

    Raises:
        PeerError: it ends or stays silent, or its port is taken.
    """
    _need_port()
    mark = uuid.uuid4().hex
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PEER_BUNDLE": str(bundle),
        "PEER_PORT": str(PORT),
        MARK: mark,
    }
    words = [word.format(port=PORT, bundle=bundle) for word in peer.command]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [python, *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
        )
        try:
            _wait(peer, process, said, sample)
            yield process.pid
        finally:
            _stop(process, mark)


def _need_port() -> None:
    """Lest another program's answers be taken for the peer's; the last peer's may end late."""
    ends = time.monotonic() + STOP_SECONDS
    while _port_is_taken():
        if time.monotonic() > ends:
            raise PeerError(f"port {PORT} is in use by another program")
        time.sleep(0.5)


def _port_is_taken() -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", PORT)) == 0


def _wait(peer: Peer, process: subprocess.Popen[bytes], said: IO[bytes], sample: Sample) -> None:
    ends = time.monotonic() + START_SECONDS
    status = 0
    while time.monotonic() < ends:
        if process.poll() is not None:
            said.seek(0)
            last = _last_line(said.read().decode(errors="replace"))
            raise PeerError(f"ended with status {process.returncode} while starting: {last}")
        status = asyncio.run(_knock(peer, sample))
        if status == 200:
            return
        time.sleep(0.5)
    raise PeerError(f"gave no answer within {START_SECONDS:g} s (status {status})")


async def _knock(peer: Peer, sample: Sample) -> int:
    client = client_of(peer)
    try:
        async with asyncio.timeout(KNOCK_SECONDS):
            return (await client.post(sample.data))[0]
    except TimeoutError:
        return 0
    finally:
        await client.close()


def _stop(process: subprocess.Popen[bytes], mark: str) -> None:
    """Kindly first; then whatever is left, in whichever process group or session it hides."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    for pid in _marked(mark):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _marked(mark: str) -> list[int]:
    wanted = f"{MARK}={mark}".encode()
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if wanted in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
    return found


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2] or "nothing was said"

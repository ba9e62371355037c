"""The sockets that the server listens at, taken before what takes long."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from server.settings import SettingsError

BACKLOG = 2048
"""Connections that may wait to be accepted, as uvicorn has it."""

ABSENT = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
"""Of an address that a name resolves to, though the system does not speak its family or have it."""


@contextmanager
def bound(host: str, port: int) -> Iterator[list[socket.socket]]:
    """A socket for each address of a host; it refuses connections until it listens.

    Raises:
        SettingsError: the host is not here, or its port not to be had.
    """
    with ExitStack() as held:
        sockets: list[socket.socket] = []
        absent: OSError | None = None
        try:
            for family, address in _addresses(host, port):
                try:
                    one = held.enter_context(_new(family))
                    one.bind(address)
                    sockets.append(one)
                except OSError as error:
                    if error.errno not in ABSENT:
                        raise
                    absent = error
            if absent and not sockets:
                raise absent
        except (OSError, UnicodeError) as error:
            raise _refused(host, port, error) from error
        yield sockets


def listen(sockets: Sequence[socket.socket]) -> None:
    """Let connections come, to be accepted soon.

    Raises:
        SettingsError: another process listens there by now.
    """
    for one in sockets:
        try:
            one.listen(BACKLOG)
        except OSError as error:
            host, port = one.getsockname()[:2]
            raise _refused(host, port, error) from error


def authority(host: str, port: int) -> str:
    """As it stands in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _addresses(host: str, port: int) -> dict[tuple[int, Any], None]:
    """Each once, though a system may name one twice; an empty host is all there are."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return dict.fromkeys((family, address) for family, _, _, _, address in found)


def _new(family: int) -> socket.socket:
    one = socket.socket(family)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:  # the other family has a socket of its own
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return one


def _refused(host: str, port: int, error: Exception) -> SettingsError:
    reason = getattr(error, "strerror", None) or error
    return SettingsError(f"cannot listen on {authority(host, port)}: {reason}")

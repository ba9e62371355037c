"""Addresses are taken at once, and let connections in only when told to."""

import socket

import pytest

from server.binding import authority, bound, listen
from server.settings import SettingsError


def has_six():
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
    except OSError:
        return False
    return True


SIX = pytest.mark.skipif(not has_six(), reason="this system has no IPv6")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "0.0.0.0", "localhost", "", pytest.param("::1", marks=SIX)]
)
def test_every_address_of_a_host_lets_connections_in_once_told_to(host):
    with bound(host, 0) as sockets:
        assert sockets
        ports = [one.getsockname()[1] for one in sockets]
        assert all(ports)
        loopbacks = ["::1" if one.family == socket.AF_INET6 else "127.0.0.1" for one in sockets]
        for where in zip(loopbacks, ports, strict=True):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(where)
        listen(sockets)
        for where in zip(loopbacks, ports, strict=True):
            socket.create_connection(where).close()
    assert [one.fileno() for one in sockets] == [-1] * len(sockets)


def test_a_port_that_another_listens_at_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = f"cannot listen on 127.0.0.1:{port}: Address already in use"
        with pytest.raises(SettingsError, match=said), bound("127.0.0.1", port):
            pass


def test_of_two_that_start_together_the_later_hears_of_it():
    with bound("127.0.0.1", 0) as first:
        port = first[0].getsockname()[1]
        with bound("127.0.0.1", port) as second:
            listen(second)
            with pytest.raises(SettingsError, match="Address already in use"):
                listen(first)


@pytest.mark.parametrize("host", ["192.0.2.1", "x" * 64])
def test_a_host_that_is_not_here_is_named(host):
    with pytest.raises(SettingsError, match=f"cannot listen on {host}:0: "), bound(host, 0):
        pass


def test_an_address_stands_in_a_url():
    assert authority("127.0.0.1", 80) == "127.0.0.1:80"
    assert authority("::1", 80) == "[::1]:80"


def test_an_address_that_a_name_has_and_the_system_has_not_is_left_out(monkeypatch):
    here, not_here = (
        (socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, 0))
        for host in ("127.0.0.1", "192.0.2.1")
    )
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [not_here, here])
    with bound("both", 0) as sockets:
        assert [one.getsockname()[0] for one in sockets] == ["127.0.0.1"]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [not_here])
    with pytest.raises(SettingsError, match="cannot listen on both:0: "), bound("both", 0):
        pass

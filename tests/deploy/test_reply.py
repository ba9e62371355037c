"""Servers are asked with no proxy between, and every failure is an OSError."""

import socket
import threading
from contextlib import contextmanager

import pytest

from deploy.reply import reply


@contextmanager
def saying(data):
    """The address of a server that says this to whoever comes, and breaks off."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            connection, _ = listening.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with saying(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi") as url:
        assert reply(url) == b"hi"


@pytest.mark.parametrize(
    "data",
    [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhi"],
    ids=["no HTTP", "cut off"],
)
def test_what_is_no_whole_response_is_one_sentence(data):
    with (
        saying(data) as url,
        pytest.raises(ConnectionError, match="speaks no HTTP, or breaks off"),
    ):
        reply(url)

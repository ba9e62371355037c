"""A lean HTTP/1.1 client: kept-alive connections and as little work a request as can be."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
from typing import Self
from urllib.parse import urlsplit

HEAD_END = b"\r\n\r\n"


class Client:
    """Posts bodies to one URL over a pool of connections, as many as this process may open.

    They are closed by `close`, or at the end of an `async with`.

    Args:
        url: `http://host:port/path?query`.
        headers: sent with every request.
    """

    def __init__(self, url: str, headers: dict[str, str] | None = None) -> None:
        _allow_all_connections()
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"not an http:// address: {url}")
        self._host, self._port = parts.hostname, parts.port or 80
        self.path = parts.path or "/"
        """What is asked for, without the query."""
        target = self.path + (f"?{parts.query}" if parts.query else "")
        lines = [f"POST {target} HTTP/1.1", f"Host: {parts.netloc}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self._head = "\r\n".join(lines).encode()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def post(self, body: bytes) -> tuple[int, bytes]:
        """Send one request.

        Returns:
            The status and the body; status 0 where no whole response came.

        Raises:
            OSError: this process may not open one more connection.
        """
        try:
            reader, writer = await self._connection()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # it is not the server that failed
            return 0, b""
        try:
            length = b"\r\nContent-Length: %d" % len(body)
            writer.write(self._head + length + HEAD_END + body)
            status, answer, keep = await _response(reader)
        except (
            OSError,
            asyncio.IncompleteReadError,
            asyncio.LimitOverrunError,
            ValueError,
            IndexError,
        ):
            writer.close()
            return 0, b""
        except asyncio.CancelledError:
            writer.close()
            raise
        if keep:
            self._idle.append((reader, writer))
        else:
            writer.close()
        return status, answer

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port)

    async def close(self) -> None:
        """Close every connection."""
        while self._idle:
            _, writer = self._idle.pop()
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _response(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    head = (await reader.readuntil(HEAD_END)).lower()
    status = int(head.split(b" ", 2)[1])
    keep = b"connection: close" not in head
    if b"transfer-encoding: chunked" in head:
        return status, await _chunks(reader), keep
    length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
    return status, await reader.readexactly(length), keep


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readline()
    await reader.readline()
    return body


def _allow_all_connections() -> None:
    """Of a server that stalls every waiting request holds one, and the usual limit is 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

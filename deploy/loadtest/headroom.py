"""How fast the load tester itself could go."""

from __future__ import annotations

import asyncio

from deploy.loadtest.client import Client
from deploy.loadtest.load import closed_loop
from deploy.loadtest.samples import Sample

SECONDS = 1.0
CLIENTS = 16
ANSWER = b'{"label": "x", "exit": 1, "reason": "confident"}'
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(ANSWER), ANSWER)


async def own_rate(sample: Sample) -> float:
    """Requests a second against a server that does nothing, in this very process.

    The tester and that server share one core, so this understates what the tester can do.
    """
    server = await asyncio.start_server(_answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = Client(f"http://127.0.0.1:{port}/")
    try:
        results = await closed_loop(client, [sample], CLIENTS, SECONDS)
    finally:
        await client.close()
        server.close()
    return len(results) / SECONDS


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
            await reader.readexactly(length)
            writer.write(RESPONSE)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()

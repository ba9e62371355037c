"""Connections that wait are taken all at once; what stays of the start is not looked through."""

import asyncio
import socket

import pytest
import uvloop

from server.listening import Acceptor

CLIENTS = 20


class Heard(asyncio.Protocol):
    """Notes connections and what they say."""

    def __init__(self, made, said):
        self._made, self._said = made, said

    def connection_made(self, transport):
        self._made.append(transport)

    def data_received(self, data):
        self._said.append(data)


async def crowd(close_first=False):
    """How many connections were made, and in how many turns all were heard."""
    made, said, loop = [], [], asyncio.get_running_loop()
    server = await loop.create_server(lambda: Heard(made, said), "127.0.0.1", 0)
    listening = server.sockets[0]
    acceptor = Acceptor(listening, lambda: Heard(made, said))
    if close_first:
        acceptor.close()
    clients = [socket.create_connection(listening.getsockname()) for _ in range(CLIENTS)]
    for client in clients:
        client.sendall(b"hello")
    turns = 0
    while len(said) < CLIENTS:
        await asyncio.sleep(0)  # one turn
        turns += 1
    for transport in made:
        assert transport.get_extra_info("socket").getsockopt(socket.SOL_TCP, socket.TCP_NODELAY)
        transport.close()
    for client in clients:
        client.close()
    if not close_first:
        acceptor.close()
    server.close()
    await server.wait_closed()
    return len(made), turns


@pytest.mark.parametrize("factory", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_all_connections_that_wait_are_taken_within_a_few_turns(factory):
    with asyncio.Runner(loop_factory=factory) as runner:
        made, turns = runner.run(crowd())
    assert made == CLIENTS
    assert turns < CLIENTS / 2


def test_a_closed_acceptor_leaves_the_listening_to_its_owner():
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        made, turns = runner.run(crowd(close_first=True))
    assert made == CLIENTS
    assert turns >= CLIENTS, "uvloop takes all at once by itself now: Acceptor is not needed"

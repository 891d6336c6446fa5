"""Messages between ranks: of a fixed size, from authenticated peers only."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from mlx_slim.ranks.beats import TOKEN_BYTES, Connection, GoneError, Message, MessageKind, Reason

TOKEN = bytes(range(TOKEN_BYTES))


@pytest.fixture
def pair() -> Iterator[tuple[Connection, Connection]]:
    ours, theirs = socket.socketpair()
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    server = listener.accept()[0]
    for unused in (ours, theirs, listener):
        unused.close()
    connections = Connection(server, 0.0), Connection(client, 0.0, rank=0)
    yield connections
    for connection in connections:
        connection.close()


def received(connection: Connection, count: int) -> list[Message]:
    messages: list[Message] = []
    end = time.monotonic() + 60
    while len(messages) < count:
        assert time.monotonic() < end, f"{len(messages)} of {count} messages came"
        messages += connection.receive(1.0)
        time.sleep(0.001)
    return messages


def greeted(connection: Connection) -> bool:
    time.sleep(0.05)
    return connection.greeted(TOKEN, 3)


@pytest.mark.parametrize(
    "message",
    [
        Message(MessageKind.BEAT, rank=2, number=2**32 - 1, seconds=-1.0),
        Message(MessageKind.LEAVING, rank=1, code=130),
        Message(MessageKind.LOST, Reason.SILENT, rank=65_535, code=-9, seconds=120.5),
    ],
)
def test_a_message_is_sixteen_bytes_and_comes_as_it_was(
    pair: tuple[Connection, Connection], message: Message
) -> None:
    assert len(message.pack()) == 16
    server, client = pair
    client.send(message)
    client.send(message)
    assert received(server, 2) == [message, message]
    assert (server.last, server.heard) == (message, 1.0)


def test_a_greeting_in_pieces_is_one(pair: tuple[Connection, Connection]) -> None:
    server, client = pair
    client.stream.send(TOKEN[:5])
    assert not greeted(server)
    client.stream.send(TOKEN[5:] + (2).to_bytes(4, "little") + Message(MessageKind.BEAT).pack())
    assert greeted(server) and server.rank == 2
    assert received(server, 1) == [Message(MessageKind.BEAT)]


@pytest.mark.parametrize(
    "hello",
    [
        b"x" * TOKEN_BYTES + (1).to_bytes(4, "little"),  # another run's
        TOKEN + (0).to_bytes(4, "little"),  # rank 0 is who listens
        TOKEN + (3).to_bytes(4, "little"),  # there are three
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1:80\r\n\r\n",
    ],
)
def test_another_greeting_ends_the_connection(
    pair: tuple[Connection, Connection], hello: bytes
) -> None:
    server, client = pair
    client.stream.send(hello)
    with pytest.raises(GoneError):
        greeted(server)
    assert server.rank is None


@pytest.mark.parametrize("byte", [0, 4, 255])
def test_what_is_no_message_ends_the_connection(
    pair: tuple[Connection, Connection], byte: int
) -> None:
    server, client = pair
    client.stream.send(bytes([byte]) * 16)
    with pytest.raises(GoneError):
        received(server, 1)


def test_the_end_of_the_peer_is_seen_after_its_last_message(
    pair: tuple[Connection, Connection],
) -> None:
    server, client = pair
    client.send(Message(MessageKind.LEAVING, code=2))
    client.close()
    assert received(server, 1) == [Message(MessageKind.LEAVING, code=2)]
    with pytest.raises(GoneError) as gone:
        received(server, 1)
    assert gone.value.reason is Reason.KILLED


def test_a_peer_that_reads_no_more_holds_nobody_up(pair: tuple[Connection, Connection]) -> None:
    server, client = pair
    client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    began = time.monotonic()
    for number in range(200_000):
        client.send(Message(MessageKind.BEAT, number=number))
        if len(client._unsent) >= 4096:
            break
    else:
        pytest.fail("the buffer of the connection never filled")
    assert time.monotonic() - began < 60
    # What is in the kernel's buffers comes; what is unsent waits for the next message.
    numbers = [one.number for one in received(server, 1)]
    assert numbers == list(range(len(numbers))), "no message is torn"

"""What ranks tell each other beside the collectives: messages of 16 bytes over TCP.

Invariant: a peer first sends the run's token and its rank, in 36 bytes, or its connection is
closed; from then on bytes are read 16 at a time, as numbers with a range, and nothing else is ever
made of them. No call here blocks. Used by ``watchdog.py``. Try it:
``python -m pytest tests/ranks/test_beats.py``.
"""

from __future__ import annotations

import errno
import hmac
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum

TOKEN_BYTES = 32
_HELLO = struct.Struct(f"<{TOKEN_BYTES}sI")
_MESSAGE = struct.Struct("<BBHhxxIf")
_SIZE = _MESSAGE.size
_MOST_UNSENT = 4096
_UNREACHABLE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN)


class MessageKind(IntEnum):
    """What a message is about."""

    BEAT = 1  # of the sender: it lives
    LEAVING = 2  # of the sender: it ends, with this exit code
    LOST = 3  # of a rank that rank 0 gives up


class Reason(IntEnum):
    """Why a rank is given up."""

    NONE = 0
    KILLED = 1  # its connection was closed without a word
    ENDED = 2  # it said that it ends with an exit code that is not 0
    SILENT = 3  # its connection is open, and nothing comes
    LATE = 4  # it lives, and does not come to a collective that others wait in
    STUCK = 5  # all wait in the same collective


@dataclass(frozen=True)
class Message:
    """What one rank tells another.

    Attributes:
        kind: What it is about.
        reason: Of ``LOST``.
        rank: Which ``LOST`` is about; else the sender.
        code: Exit code of ``LEAVING``, or of the rank that ``LOST`` is about.
        number: Collectives that the sender has entered.
        seconds: For which the sender waits in the last of them; of ``LOST``, how long it took.
            Negative: it is in none, and what it does may take its time.
    """

    kind: MessageKind
    reason: Reason = Reason.NONE
    rank: int = 0
    code: int = 0
    number: int = 0
    seconds: float = 0.0

    def pack(self) -> bytes:
        """Return the 16 bytes."""
        code = max(-(2**15), min(self.code, 2**15 - 1))
        number = self.number % 2**32
        return _MESSAGE.pack(self.kind, self.reason, self.rank, code, number, self.seconds)


class GoneError(Exception):
    """The peer can be reached no more: ``reason`` says how that was seen."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.name)
        self.reason = reason


class Connection:
    """A connection to a rank, or, until it has told which, to anybody.

    Args:
        stream: Connected; it is made non-blocking.
        opened: When, in seconds of the monotonic clock.

    Attributes:
        rank: Of the peer; None until it is known.
        heard: When the last message came.
        last: The last message.
    """

    def __init__(self, stream: socket.socket, opened: float, rank: int | None = None) -> None:
        self.stream = stream
        self.stream.setblocking(False)
        self.stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rank = rank
        self.opened = self.heard = opened
        self.last = Message(MessageKind.BEAT)
        self._buffer = self._unsent = b""

    def greet(self, token: bytes, rank: int) -> None:
        """Say who this is, first of all."""
        self._send(_HELLO.pack(token, rank))

    def greeted(self, token: bytes, ranks: int) -> bool:
        """Read what has come of the greeting; return whether it is whole and right.

        Raises:
            GoneError: It is wrong, or the peer closed.
        """
        self._read(_HELLO.size - len(self._buffer))
        if len(self._buffer) < _HELLO.size:
            return False
        theirs, rank = _HELLO.unpack(self._buffer)
        if not hmac.compare_digest(theirs, token) or not 0 < rank < ranks:
            raise GoneError(Reason.NONE)
        self.rank, self._buffer = rank, b""
        return True

    def send(self, message: Message) -> None:
        """Send a message; one that has no room for minutes is left out.

        Raises:
            GoneError: The peer cannot be reached.
        """
        self._send(message.pack())

    def receive(self, now: float) -> list[Message]:
        """Return the messages that have come whole.

        Raises:
            GoneError: The peer closed, or sent what is no message.
        """
        self._read(64 * _SIZE)
        messages = []
        while len(self._buffer) >= _SIZE:
            raw, self._buffer = self._buffer[:_SIZE], self._buffer[_SIZE:]
            kind, reason, rank, code, number, seconds = _MESSAGE.unpack(raw)
            try:
                message = Message(MessageKind(kind), Reason(reason), rank, code, number, seconds)
            except ValueError:
                raise GoneError(Reason.NONE) from None
            messages.append(message)
            self.heard, self.last = now, message
        return messages

    def close(self) -> None:
        """Close it."""
        self.stream.close()

    def _send(self, data: bytes) -> None:
        if len(self._unsent) < _MOST_UNSENT:  # a peer that reads no more has a full buffer
            self._unsent += data
        try:
            self._unsent = self._unsent[self.stream.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError as error:
            raise GoneError(_reason(error)) from error

    def _read(self, most: int) -> None:
        try:
            data = self.stream.recv(most)
        except BlockingIOError:
            return
        except OSError as error:
            raise GoneError(_reason(error)) from error
        if not data:
            raise GoneError(Reason.KILLED)
        self._buffer += data


def _reason(error: OSError) -> Reason:
    return Reason.SILENT if error.errno in _UNREACHABLE else Reason.KILLED

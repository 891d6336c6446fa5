"""A thread that ends this rank when another one is missing: no collective can be interrupted.

Invariant: each rank has one connection, to rank 0, which is authenticated by a token that the
collectives carried; with one rank nothing listens and no thread starts. Rank 0 judges, the others
judge rank 0 alone; so all name the same rank. A rank that ends so prints one line and leaves by
``os._exit(1)``, outside of file operations (``interrupts.finishing``); a cut anywhere else is one
that every writer survives (``tests/test_kills.py``). Used by ``runtime.world``. Try it:
``mlx.launch -n 2 -- mlx-slim train …``, then ``kill -KILL`` or ``-STOP`` one of the two.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_slim.ranks.beats import Connection, GoneError, Message, MessageKind, Reason
from mlx_slim.ranks.state import CollectiveState

TIMEOUT = 120.0  # seconds: of a collective, and without a heartbeat; --rank-timeout
_INTERVAL = 1.0  # seconds between heartbeats, at most
_JOIN = 60.0  # seconds for all to connect
_FIRST = 10.0  # seconds that the start waits for that
_STRANGERS = 16  # connections that have not said who they are
_GREETING = 5.0  # seconds to say it
# After a rank said that it ends: all may be about to, for the same reason.
_GRACE = 3.0

_LINES = {
    Reason.KILLED: "ended without a word: killed, crashed, or out of memory",
    Reason.ENDED: "ended with exit code {code}; its message says why",
    Reason.SILENT: (
        "has sent no heartbeat for {seconds:.0f} s: it is stopped or asleep, or its link is cut"
    ),
    Reason.LATE: "lives, and is {seconds:.0f} s late at a collective that the others wait in",
    Reason.STUCK: (
        "waits in the same collective as all others for {seconds:.0f} s: a link between two "
        "ranks is cut, or MLX's backend hangs"
    ),
}


@dataclass(frozen=True)
class Peers:
    """The ranks and how to reach rank 0.

    Attributes:
        rank: Of this process.
        hosts: Name of the machine of each rank.
        address: Host and port of rank 0.
        token: Of this run.
    """

    rank: int
    hosts: Sequence[str]
    address: tuple[str, int]
    token: bytes

    def name(self, rank: int) -> str:
        """Return how a message names a rank: with its machine where there are several."""
        several = f" on {self.hosts[rank]}" if len(set(self.hosts)) > 1 else ""
        return f"rank {rank} of {len(self.hosts)}{several}"


class Watchdog:
    """Sends heartbeats, receives them, and calls ``give_up`` when a rank is missing.

    Args:
        peers: See there.
        state: Of this process.
        timeout: Seconds, see ``TIMEOUT``.
        give_up: Called in the watchdog's thread with what is missing, once.
        listener: Of rank 0, bound and listening; None on the others.
        warn: Told what is not watched.
    """

    def __init__(
        self,
        peers: Peers,
        state: CollectiveState,
        timeout: float,
        give_up: Callable[[str], None],
        listener: socket.socket | None,
        warn: Callable[[str], None],
    ) -> None:
        self._peers, self._state, self.timeout = peers, state, timeout
        self._give_up, self._listener, self._warn = give_up, listener, warn
        self._selector = selectors.DefaultSelector()
        self._connections: list[Connection] = []  # of ranks
        self._ended: set[int] = set()  # ranks that have said that they end
        self._pending: tuple[float, Message] | None = None  # to act on at that time
        self._joined = threading.Event()
        self._leaving = threading.Lock()  # held for ever by who ends this process
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)

    def start(self) -> None:
        """Start the thread; return when all ranks are connected, or after some seconds."""
        self._thread.start()
        self._joined.wait(_FIRST)

    @property
    def _interval(self) -> float:
        """Seconds between heartbeats."""
        return min(_INTERVAL, self.timeout / 8)

    @property
    def missing(self) -> str:
        """The line about the rank that is about to be given up, empty if none is."""
        return self._line(self._pending[1]) if self._pending else ""

    def leave(self, code: int) -> None:
        """Tell the others that this rank ends with ``code``, and stop watching."""
        if not self._leaving.acquire(blocking=False):
            return
        self._tell(Message(MessageKind.LEAVING, rank=self._peers.rank, code=code))
        # The end of the process closes the connections: to close one in which something is on its
        # way here may discard what has just been sent.

    def forget(self) -> None:
        """Close what a forked process inherited: the peers must see the end of its parent."""
        for connection in self._connections:
            connection.close()
        if self._listener is not None:
            self._listener.close()
        self._selector.close()

    # ------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        strangers = [] if self._listener is not None else [self._connect()]
        began = before = time.monotonic()
        if self._listener is not None:
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ, None)
        else:
            self._joined.set()
        self._connections = [one for one in strangers if one is not None]
        for one in self._connections:
            self._selector.register(one.stream, selectors.EVENT_READ, one)
        beat = 0.0
        while not self._leaving.locked():
            ready = self._selector.select(self._interval / 2)
            now = time.monotonic()
            if now - before > 4 * self._interval:  # this process was stopped, not the others
                for one in self._connections:
                    one.heard += now - before
            before = now
            for key, _ in ready:
                if key.data is None:
                    self._accept(now)
                else:
                    self._hear(key.data, now)
            if self._listener is not None:
                self._close_door(now, began)
            if now - beat >= self._interval:
                beat = now
                number, seconds = self._state.number, self._state.seconds(now)
                rank = self._peers.rank
                self._tell(Message(MessageKind.BEAT, rank=rank, number=number, seconds=seconds))
            self._judge(now)

    def _connect(self) -> Connection | None:
        """Return a connection to rank 0; None, with a warning, if it cannot be reached."""
        error: OSError = TimeoutError("timed out")
        until = time.monotonic() + _JOIN / 2
        while time.monotonic() < until and not self._leaving.locked():
            try:
                stream = socket.create_connection(self._peers.address, timeout=10)
                connection = Connection(stream, time.monotonic(), 0)
                connection.greet(self._peers.token, self._peers.rank)
                return connection
            except OSError as refused:
                error = refused
                time.sleep(self._interval)
            except GoneError:
                time.sleep(self._interval)
        host, port = self._peers.address
        self._warn(
            f"no heartbeat: rank {self._peers.rank} cannot reach rank 0 at {host} port {port} "
            f"({error.strerror or error}): a rank that is lost may be waited for without end"
        )
        return None

    def _accept(self, now: float) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            stream = self._listener.accept()[0]
            strangers = [c for c in self._registered() if c.rank is None]
            if len(strangers) >= _STRANGERS:
                self._drop(min(strangers, key=lambda one: one.opened))
            self._selector.register(stream, selectors.EVENT_READ, Connection(stream, now))

    def _registered(self) -> list[Connection]:
        keys = self._selector.get_map().values()
        return [key.data for key in keys if key.data is not None]

    def _drop(self, connection: Connection) -> None:
        self._selector.unregister(connection.stream)
        connection.close()
        if connection in self._connections:
            self._connections.remove(connection)

    def _close_door(self, now: float, began: float) -> None:
        """Listen no more once all ranks have come, or their time is over."""
        assert self._listener is not None
        joined = {one.rank for one in self._connections} | self._ended
        missing = set(range(1, len(self._peers.hosts))) - joined
        for one in self._registered():
            if one.rank is None and (now - one.opened > _GREETING or not missing):
                self._drop(one)
        if missing and now - began < _JOIN:
            return
        self._selector.unregister(self._listener)
        self._listener.close()
        self._listener = None
        self._joined.set()
        for rank in sorted(missing):
            self._warn(f"no heartbeat of {self._peers.name(rank)}: it did not connect to rank 0")

    def _hear(self, connection: Connection, now: float) -> None:
        try:
            if connection.rank is None:
                if connection.greeted(self._peers.token, len(self._peers.hosts)):
                    connection.heard = now
                    self._connections.append(connection)
                return
            for message in connection.receive(now):
                self._take(connection, message, now)
        except GoneError as gone:
            self._gone(connection, gone.reason, now)

    def _take(self, connection: Connection, message: Message, now: float) -> None:
        if message.kind is MessageKind.LOST and connection.rank == 0:
            if message.rank < len(self._peers.hosts) and message.reason is not Reason.NONE:
                self._lost(message, now)
        elif message.kind is MessageKind.LEAVING and connection.rank is not None:
            self._ended.add(connection.rank)
            if message.code:
                lost = Message(MessageKind.LOST, Reason.ENDED, connection.rank, message.code)
                self._lost(lost, now, _GRACE)

    def _gone(self, connection: Connection, reason: Reason, now: float) -> None:
        rank, silent = connection.rank, now - connection.heard
        self._drop(connection)
        if rank is not None and rank not in self._ended and reason is not Reason.NONE:
            self._lost(Message(MessageKind.LOST, reason, rank, seconds=silent), now)

    # ------------------------------------------------------------------------------- judgement

    def _judge(self, now: float) -> None:
        if self._pending is None:
            for one in self._connections:
                if one.rank not in self._ended and now - one.heard > self.timeout:
                    assert one.rank is not None
                    silent = Message(
                        MessageKind.LOST, Reason.SILENT, one.rank, seconds=now - one.heard
                    )
                    self._lost(silent, now)
            if self._peers.rank == 0 and (late := self._late(now)) is not None:
                self._lost(late, now)
        if self._pending is not None and now >= self._pending[0]:
            self._leave(self._pending[1])

    def _late(self, now: float) -> Message | None:
        """Return which rank the others have waited for too long; None if there is none."""
        places = {one.rank: one.last for one in self._connections if one.rank is not None}
        at, seconds = self._state.number, self._state.seconds(now)
        places[0] = Message(MessageKind.BEAT, number=at, seconds=seconds)
        longest = max(one.seconds for one in places.values())
        if longest <= self.timeout:
            return None
        for one in self._connections:
            if (silent := now - one.heard) > 5 * self._interval and one.rank not in self._ended:
                assert one.rank is not None
                return Message(MessageKind.LOST, Reason.SILENT, one.rank, seconds=silent)
        front = max(one.number for one in places.values())
        behind = {rank: one for rank, one in places.items() if one.number < front}
        if any(one.seconds < 0 for one in behind.values()):  # it does what takes its time
            return None
        if self._ended:
            return Message(MessageKind.LOST, Reason.ENDED, min(self._ended))
        if behind:
            return Message(MessageKind.LOST, Reason.LATE, min(behind), seconds=longest)
        return Message(MessageKind.LOST, Reason.STUCK, 0, seconds=longest)

    def _lost(self, message: Message, now: float, grace: float = 0.0) -> None:
        """Note the first rank that is missing; what comes later follows from it."""
        if self._pending is None:
            self._pending = now + grace, message

    def _leave(self, message: Message) -> None:
        if not self._leaving.acquire(blocking=False):
            return
        self._tell(message)
        self._give_up(self._line(message))

    def _line(self, message: Message) -> str:
        what = _LINES[message.reason].format(code=message.code, seconds=message.seconds)
        if message.rank == self._peers.rank and message.reason is not Reason.STUCK:
            return f"the others gave this rank up: {self._peers.name(message.rank)} {what}"
        return f"{self._peers.name(message.rank)} {what}"

    def _tell(self, message: Message) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(GoneError, OSError):
                connection.send(message)

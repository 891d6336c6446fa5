"""The watchdog of this process: started with the group of ranks, told of the end.

Invariant: ``start`` is the first collective of every rank; with one rank nothing here does
anything. What ends a rank is printed once, in one line with the command that resumes. Used by
``runtime.world`` and by ``cli/main.py``. Try it: see ``watchdog.py``.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import secrets
import socket
import sys
import time
from pathlib import Path

import mlx.core as mx

from mlx_slim.interrupts import finishing
from mlx_slim.ranks.beats import TOKEN_BYTES
from mlx_slim.ranks.collectives import all_gather
from mlx_slim.ranks.collectives import lost_peer as lost_peer
from mlx_slim.ranks.state import resume_hint, state
from mlx_slim.ranks.watchdog import TIMEOUT, Peers, Watchdog

_FINISH_SECONDS = 30.0  # for a file that is being written when another rank is lost

_timeout = TIMEOUT
_watchdog: Watchdog | None = None


def set_timeout(seconds: float) -> None:
    """Set after how long a rank is given up."""
    global _timeout
    _timeout = seconds
    if _watchdog is not None:
        _watchdog.timeout = seconds


def gather_bytes(data: bytes, group: mx.distributed.Group, *, patient: bool = False) -> list[bytes]:
    """Return what every rank gave, in the order of ranks; all ranks must call it.

    ``patient``: as ``collectives.watched``.
    """
    if group.size() == 1:
        return [data]
    import numpy as np  # slow to import, and needed by several ranks only

    lengths = np.array(all_gather(mx.array([len(data)]), group, "lengths", patient=patient))
    padded = np.zeros(max(1, int(lengths.max())), dtype=np.uint8)
    padded[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    rows = np.array(all_gather(mx.array(padded), group, "bytes")).reshape(group.size(), -1)
    return [row[:length].tobytes() for row, length in zip(rows, lengths.tolist(), strict=True)]


def start(group: mx.distributed.Group) -> None:
    """Watch the ranks of ``group``, if there are several; all ranks must call it."""
    global _watchdog
    if group.size() == 1 or _watchdog is not None:
        return
    first = group.rank() == 0
    listener, token = None, b""
    host = socket.gethostname()
    hosts = [each.decode(errors="replace") for each in gather_bytes(host.encode(), group)]
    address, port = "", 0
    if first:
        address = _address(several=len(set(hosts)) > 1)
        with contextlib.suppress(OSError):
            listener = socket.create_server((address, 0), family=_family(address))
            port = listener.getsockname()[1]
            token = secrets.token_bytes(TOKEN_BYTES)
    told = json.loads(gather_bytes(json.dumps([address, port, token.hex()]).encode(), group)[0])
    if not told[1]:
        if first:
            _warn(f"no heartbeat: rank 0 cannot listen on {address}")
        return
    peers = Peers(group.rank(), hosts, (told[0], told[1]), bytes.fromhex(told[2]))
    _watchdog = Watchdog(peers, state, _timeout, _give_up, listener, _warn)
    os.register_at_fork(after_in_child=_forget)
    atexit.register(lambda: leave(1 if hasattr(sys, "last_value") else 0))
    _watchdog.start()


def _address(*, several: bool) -> str:
    """Return where rank 0 listens: where the backend reaches it; on one machine, there alone."""
    if not several:
        return "127.0.0.1"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return str(
            json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text())[0][0].rpartition(":")[0]
        )
    if coordinator := os.environ.get("MLX_JACCL_COORDINATOR"):
        return coordinator.rpartition(":")[0]
    return os.environ.get("NCCL_HOST_IP") or socket.gethostbyname(socket.gethostname())


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def watching() -> bool:
    """Return whether there are other ranks, and a watchdog."""
    return _watchdog is not None


def missing_rank() -> str:
    """Return the line about a rank that is lost while this one ends too; empty if none is."""
    return (
        f"{_watchdog.missing}; {resume_hint()}"
        if _watchdog is not None and _watchdog.missing
        else ""
    )


def leave(code: int) -> None:
    """Tell the other ranks that this one ends with ``code``; nothing watches it any more."""
    if _watchdog is not None:
        _watchdog.leave(code)


def _forget() -> None:
    global _watchdog
    if _watchdog is not None:
        _watchdog.forget()
        _watchdog = None


def _give_up(line: str) -> None:
    """End this process, in the watchdog's thread, when no file operation is under way."""
    until = time.monotonic() + _FINISH_SECONDS
    while finishing() and state.since is None and time.monotonic() < until:
        time.sleep(0.02)
    cursor = "\x1b[?25h\n" if os.isatty(2) else ""  # a progress bar hides it
    with contextlib.suppress(OSError):
        os.write(2, f"{cursor}error: {line}; {resume_hint()}\n".encode())
    os._exit(1)


def _warn(text: str) -> None:
    logging.getLogger("mlx_slim").warning("warning: %s", text)

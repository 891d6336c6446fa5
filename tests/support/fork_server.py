"""A stand-in for the program ``mlx-slim`` that starts in milliseconds, for scripts of many calls.

One process imports everything and computes nothing (MLX's threads do not survive a fork); a call
forks it, takes over the caller's folder, environment and streams, and runs the command line. What
differs from the program: imports happened before, and a signal to the caller does not reach the
fork; tests of either start the program itself. ``serve`` is used in ``tests/test_examples.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_CALLER = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({place!r})
call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(call).to_bytes(8, "big")], [0, 1, 2])
server.sendall(call)
sys.exit(int(server.recv(8) or b"1"))
"""


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Path]:
    """Run the server for a block; yield a folder whose ``mlx-slim`` calls it.

    Args:
        folder: An empty one with a short path.
    """
    place, program = folder / "server", folder / "bin" / "mlx-slim"
    program.parent.mkdir()
    program.write_text(_CALLER.format(python=sys.executable, place=str(place)))
    program.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.fork_server", str(place)], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        yield program.parent
    finally:
        process.kill()
        process.wait()


def _answer(connection: socket.socket) -> None:
    """Run one call in this process, and end it."""
    header, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
    data = b""
    while len(data) < int.from_bytes(header, "big"):
        data += connection.recv(1 << 16)
    words, folder, environment = json.loads(data)
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code = 1
    try:
        from mlx_slim.cli.main import run

        code = run(words)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        with contextlib.suppress(OSError):
            connection.sendall(str(code).encode())
        os._exit(code)


def main(place: str) -> None:
    """Serve until the process is killed."""
    import importlib

    from mlx_slim import api, trackers  # noqa: F401
    from mlx_slim.cli.main import COMMANDS
    from mlx_slim.compare import cell, report, runner  # noqa: F401

    for module, _ in COMMANDS.values():
        importlib.import_module(f"mlx_slim.cli.{module}")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(place)
        server.listen()
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _answer(connection)
            connection.close()
            with contextlib.suppress(ChildProcessError):  # those that have ended
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


if __name__ == "__main__":
    main(sys.argv[1])

"""Serve: OpenAI's chat and completion requests, answered by one model and its adapters.

Invariant: only what was given on the command line is served, and nothing else is read or fetched
for a request; the port is taken before the model is loaded. Try it:
``mlx-slim serve MODEL --adapter runs/mine/adapters``.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from typing import Any

from mlx_slim import runtime
from mlx_slim.agreement import on_every_rank
from mlx_slim.errors import SlimError
from mlx_slim.reading import one_line
from mlx_slim.serving.generator import Generator, Provider
from mlx_slim.serving.handler import CompletionHandler
from mlx_slim.serving.names import ServedNames
from mlx_slim.serving.options import ServeOptions

_LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(
    model: str,
    options: ServeOptions,
    *,
    tell: Callable[[str], None],
    started: Callable[[str, list[str]], None],
) -> None:
    """Serve ``model`` until an interrupt.

    Args:
        model: Folder or hub id.
        options: Adapters, address, limits.
        tell: Called with notes and the access log, one line each, from any thread.
        started: Called with the address (``http://HOST:PORT/v1``) and the names of models once
            requests are answered.

    Raises:
        SlimError: If the address is taken, or the model, an adapter or the draft cannot be used.
        KeyboardInterrupt: Ctrl-C; requests that are being answered are ended.
    """
    if not runtime.leads():
        _compute_along(model, options)
        return
    with listening(model, options, tell) as (server, provider):
        host = f"[{options.host}]" if ":" in options.host else options.host
        started(f"http://{host}:{server.server_port}/v1", provider.served.all)
        server.serve_forever(poll_interval=0.1)


@contextlib.contextmanager
def listening(
    model: str, options: ServeOptions, tell: Callable[[str], None]
) -> Iterator[tuple[Server, Provider]]:
    """Inside, ``model`` is loaded and its port taken: ``serve_forever`` answers.

    Args:
        model: Folder or hub id.
        options: Adapters, address, limits.
        tell: Called with notes and the access log.

    Raises:
        SlimError: As ``serve``.
    """
    _check_ranks(options)
    served = ServedNames.of(model, options.adapter, options.draft_model)
    with contextlib.ExitStack() as open_until_done:
        bound = _bound(options.host, options.port, tell)
        server = on_every_rank(lambda: open_until_done.enter_context(bound))
        open_until_done.enter_context(runtime.memory_limits())
        provider = Provider(served, options, tell)
        generator = Generator(provider)
        try:
            generator.wait()
            server.RequestHandlerClass = CompletionHandler.for_generator(generator)
            server.server_activate()
            if options.host not in _LOCAL:
                tell(f"whoever reaches {options.host} can use this server: it asks for no key")
            yield server, provider
        finally:
            generator.stop_and_join()
            if generator.figures.proposed:
                tell(f"in all, {generator.figures}")


def _compute_along(model: str, options: ServeOptions) -> None:
    """Compute the requests that rank 0 gets, until it ends."""
    _check_ranks(options)
    on_every_rank(lambda: None)  # whether rank 0 has its port
    with runtime.memory_limits():
        served = ServedNames.of(model, options.adapter, options.draft_model)
        generator = Generator(Provider(served, options, lambda _: None))
        try:
            generator.wait()
            generator.join()
        finally:
            generator.stop_and_join()


def _check_ranks(options: ServeOptions) -> None:
    if runtime.world().size() > 1 and options.adapter:
        if not runtime.leads():
            raise SystemExit(SlimError.exit_code)
        raise SlimError(
            "serve over several ranks has one model without adapters",
            "merge one first: mlx-slim fuse MODEL --adapter DIR -o OUT",
        )


class Server(ThreadingHTTPServer):
    """A thread a connection; errors of connections are one line."""

    def __init__(
        self, address: Any, family: socket.AddressFamily, tell: Callable[[str], None]
    ) -> None:
        self.address_family, self._tell = family, tell
        super().__init__(address, CompletionHandler, bind_and_activate=False)

    def server_bind(self) -> None:
        """Take the address, without looking up this machine's name."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what ended a connection; a client that left is no error."""
        error = sys.exception()
        if error is not None and not isinstance(error, (ConnectionError, TimeoutError)):
            self._tell(f"{client_address[0]}: {one_line(error)}")


@contextlib.contextmanager
def _bound(host: str, port: int, tell: Callable[[str], None]) -> Iterator[Server]:
    """Inside, a server has its port; it does not answer yet.

    Raises:
        SlimError: If the address is taken, or is none of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise SlimError(
            f"--host {host} is no address: {one_line(error)}", "127.0.0.1 is this machine alone"
        ) from error
    with Server(address, family, tell) as server:
        try:
            if port and _answers(family, address):  # macOS binds a port beside one of all hosts
                raise OSError(errno.EADDRINUSE, "in use")
            server.server_bind()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise SlimError(
                    f"port {port} of {host} is taken by another program",
                    "choose another with --port, or --port 0 for any free one",
                ) from error
            raise SlimError(
                f"cannot listen on port {port} of {host}: {error.strerror or one_line(error)}",
                "choose another --host or --port",
            ) from error
        yield server


def _answers(family: socket.AddressFamily, address: Any) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(address) == 0

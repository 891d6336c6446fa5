"""A real HTTP server on this machine that plays an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any, dict[str, str]]
Script = Callable[[int, dict[str, Any]], Reply]


def completion(text: Any, reason: str = "stop") -> dict[str, Any]:
    """Return a chat completion as such servers write it."""
    return {"choices": [{"message": {"role": "assistant", "content": text},
                         "finish_reason": reason}]}  # fmt: skip


def answers(number: int, body: dict[str, Any]) -> Reply:
    """Answer with the length of the question, so that answers can be told apart."""
    question = body["messages"][-1]["content"]
    return 200, completion(f"Because it has {len(question)} characters: {question[-12:]!r}."), {}


@dataclass
class Served:
    """The server's address and what it was asked.

    Attributes:
        base_url: Up to ``/v1``.
        requests: Bodies, with ``path`` and ``authorization`` added.
        most: Most requests that were inside at one time.
    """

    base_url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    inside: int = 0
    most: int = 0


@contextmanager
def serving(script: Script = answers, *, slow: float = 0.0, port: int = 0) -> Iterator[Served]:
    """Serve ``script`` (request number, body) -> (status, JSON or bytes, headers)."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(served.requests)
                key = self.headers.get("Authorization")
                served.requests.append({**body, "path": self.path, "authorization": key})
                served.inside += 1
                served.most = max(served.most, served.inside)
            time.sleep(slow)
            status, value, headers = script(number, body)
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            with lock:
                served.inside -= 1
            self.send_response(status)
            for name, text in headers.items():
                self.send_header(name, text)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError):  # the client gave up
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    served = Served(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

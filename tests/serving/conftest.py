"""A server of tiny models in this process."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.serving.generator import Provider
from mlx_slim.serving.options import ServeOptions
from mlx_slim.serving.run import listening
from tests.support.adapters import write_adapter
from tests.support.tiny import tiny_model

MESSAGES = [{"role": "user", "content": "hello there"}]


@dataclass
class Running:
    """A server, and what it said."""

    port: int
    provider: Provider
    model: str
    told: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def send(
        self, path: str, body: bytes | None, *, method: str = "POST", **headers: str
    ) -> tuple[int, bytes]:
        """Return status and body of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()

    def chat(self, **body: Any) -> tuple[int, dict[str, Any]]:
        """Return status and record of a chat request; ``body`` overrides a short valid one."""
        valid = {"model": self.model, "messages": MESSAGES, "max_tokens": 4}
        status, data = self.send("/v1/chat/completions", json.dumps({**valid, **body}).encode())
        return status, json.loads(data)


@dataclass(frozen=True)
class Files:
    """What the servers are given."""

    model: str
    student: str
    adapters: tuple[str, ...]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A model of heads that a cache can quantize, a smaller one, and two adapters."""
    folder = tmp_path_factory.mktemp("served")
    model = tiny_model(folder / "model", head_dim=32)
    student = tiny_model(folder / "student", head_dim=32, num_hidden_layers=1, seed=3)
    adapters = [write_adapter(folder / name, model, size=0.3) for name in ("one", "two")]
    return Files(str(model), str(student), tuple(map(str, adapters)))


@contextlib.contextmanager
def run_server(model: str | Path, **options: Any) -> Iterator[Running]:
    """Serve inside, on a free port."""
    told: list[str] = []
    settings = ServeOptions(port=0, **options)
    with listening(str(model), settings, told.append) as (server, provider):
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield Running(server.server_port, provider, str(model), told)
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def running(files: Files) -> Iterator[Running]:
    """The model with both adapters."""
    with run_server(files.model, adapter=files.adapters) as one:
        yield one

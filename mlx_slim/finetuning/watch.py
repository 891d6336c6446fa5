"""The page of a run served on this machine while the run is in progress.

Invariant: it listens on 127.0.0.1 alone, answers only who asks for it by that name, reads the run
folder and writes nothing. The open page asks every two seconds whether the folder has changed, and
then takes the new contents in place. Try it: ``mlx-slim report RUN --watch``.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mlx_slim.artifacts import hash_json
from mlx_slim.data.ledger import LEDGER_FILE
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.logged import METRICS_FILE
from mlx_slim.finetuning.report import render
from mlx_slim.finetuning.run_dir import ANSWERS_FILE, RECORD, STATE_FILE

HOST = "127.0.0.1"
VERSION_PATH = "/version"
_FILES = (STATE_FILE, METRICS_FILE, LEDGER_FILE, ANSWERS_FILE, RECORD)

_SCRIPT = """<script nonce="{nonce}">
let seen = {version};
async function look() {{
  try {{
    const version = await (await fetch("/version")).text();
    if (version !== seen) {{
      const text = await (await fetch("/")).text();
      const next = new DOMParser().parseFromString(text, "text/html");
      for (const tag of ["header", "main", "footer", "title"])
        document.querySelector(tag).innerHTML = next.querySelector(tag).innerHTML;
      seen = version;
    }}
  }} catch (error) {{ document.title = "not served any more"; }}
  setTimeout(look, 2000);
}}
setTimeout(look, 2000);
</script>"""


def version(out: Path) -> str:
    """Return a word that changes whenever a record of the run in ``out`` does."""
    stats: list[os.stat_result | None] = []
    for name in _FILES:
        try:
            stats.append((out / name).stat())
        except OSError:  # not there yet, or not any more
            stats.append(None)
    return hash_json([stat and (stat.st_size, stat.st_mtime_ns) for stat in stats])[:16]


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of who asks and leaves."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def server(out: Path, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of the page of the run in ``out``; ``serve_forever`` starts it.

    Args:
        out: The run folder.
        port: To listen on; 0 takes a free one.

    Raises:
        SlimError: If the port cannot be taken.
    """
    handler = _handler(lambda: version(out), lambda script: render(out, script=script))
    try:
        return _Server((HOST, port), handler)
    except OSError as error:
        raise SlimError(
            f"port {port} cannot be listened on: {error.strerror}",
            "give another --port, or none for a free one",
        ) from error


def _handler(now: Callable[[], str], page: Callable[[str], str]) -> type[BaseHTTPRequestHandler]:
    """Return the class that answers requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer with the page, or with the word that says whether it changed."""
            host = (self.headers.get("Host") or "").partition(":")[0]  # port 80 is left out
            if host not in (HOST, "localhost"):  # a page of elsewhere that found a name for us
                self._answer(HTTPStatus.FORBIDDEN, "text/plain", "not here\n")
            elif self.path == VERSION_PATH:
                self._answer(HTTPStatus.OK, "text/plain", now())
            elif self.path == "/":
                nonce = secrets.token_urlsafe(16)
                script = _SCRIPT.format(nonce=nonce, version=repr(now()))
                try:
                    self._answer(HTTPStatus.OK, "text/html", page(script), nonce)
                except SlimError as error:  # a record that is being written
                    self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"{error}\n")
            else:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", "not here\n")

        def _answer(self, status: HTTPStatus, kind: str, text: str, nonce: str = "") -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
            if nonce:
                policy += f"; script-src 'nonce-{nonce}'; connect-src 'self'"
            self.send_header("Content-Security-Policy", policy)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing of each request."""

    return Handler

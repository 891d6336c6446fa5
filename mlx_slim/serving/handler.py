"""mlx-lm's request handler, behind checks.

Invariant: mlx-lm's code sees a body only after ``requests.py`` has checked it; every refusal is a
status and one line of JSON as OpenAI's clients read it, and none of them touches disk, hub or the
model. Used by ``serving/run.py``.
"""

from __future__ import annotations

import io
import ipaddress
import json
from http import HTTPStatus
from http.client import HTTPMessage
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from mlx_lm.server import APIHandler, CompletionRequest

from mlx_slim import __version__
from mlx_slim.errors import SlimError, printable
from mlx_slim.reading import JsonObject, one_line, shown
from mlx_slim.serving.generator import Generator, Refused
from mlx_slim.serving.names import NotServed
from mlx_slim.serving.requests import CHAT, MAX_BODY, TEXT, as_error, read_request

_MODELS = "/v1/models"


class CompletionHandler(APIHandler):
    """Answers one request; ``for_generator`` makes the class of a server."""

    timeout = 60  # seconds that a client may take for its next bytes
    server_version, sys_version = f"mlx-slim/{__version__}", ""
    generator: Generator

    def __init__(self, *arguments: Any) -> None:
        super().__init__(self.generator, *arguments, system_fingerprint=self.server_version)

    @classmethod
    def for_generator(cls, generator: Generator) -> type[CompletionHandler]:
        """Return the handler's class that asks ``generator``."""
        return type("CompletionHandler", (cls,), {"generator": generator})

    def log_message(self, format: str, *arguments: Any) -> None:
        """Report a line of the access log."""
        self.generator.provider.tell(printable(f"{self.address_string()} {format % arguments}"))

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Report a request and its status."""
        self.log_message("%s %s", shown(self.requestline)[1:-1], getattr(code, "value", code))

    def do_GET(self) -> None:
        """Answer ``/v1/models``, one of them, or ``/health``."""
        path = _split(self.path).path
        if path == "/health":
            self.handle_health_check()
        elif path == _MODELS or path.startswith(f"{_MODELS}/"):
            self.handle_models_request()
        else:
            self._refuse(404, SlimError(f"nothing is served at {shown(self.path)}"))

    def handle_models_request(self) -> None:
        """Answer with the names of the command line."""
        name = unquote(_split(self.path).path[len(_MODELS) + 1 :])
        records = [
            {"id": each, "object": "model", "created": self.created, "owned_by": "mlx-slim"}
            for each in self.generator.provider.served.all
            if name in ("", each)
        ]
        if not records:
            self._refuse(404, NotServed(f"no model {shown(name)} is served"))
            return
        self._send(200, records[0] if name else {"object": "list", "data": records})

    def do_POST(self) -> None:
        """Check the body of a completion request, and let mlx-lm answer it."""
        path = _split(self.path).path
        if path not in (*CHAT, TEXT):
            self._refuse(404, SlimError(f"nothing is served at {shown(self.path)}"))
            return
        origin = self.headers.get("Origin")
        if origin is not None and not self._is_same_origin(origin):
            self._refuse(403, SlimError(f"a page of {shown(origin)} may not use this server"))
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 12):
            self._refuse(411, SlimError("the request has no length: send Content-Length"))
            return
        if int(length) > MAX_BODY:
            text = f"the request has {int(length):,} bytes, expected at most {MAX_BODY:,}"
            self._refuse(413, SlimError(text))
            return
        provider = self.generator.provider
        try:
            data = self.rfile.read(int(length))
            body = read_request(data, path, provider.served, provider.vocabulary)
            if body.get("tools") and not provider.tokenizer.has_tool_calling:
                raise SlimError("the request has tools, and this model's chat template has none")
        except NotServed as error:
            self._refuse(404, error)
            return
        except SlimError as error:
            self._refuse(400, error)
            return
        clean = json.dumps(body).encode()
        del self.headers["Content-Length"]
        self.headers["Content-Length"] = str(len(clean))
        sent, self.path = self.rfile, path
        self.rfile = io.BytesIO(clean)
        try:
            super().do_POST()
        finally:
            self.rfile = sent

    def _is_same_origin(self, origin: str) -> bool:
        """Return whether a page of this server asks.

        Where it came from this machine it is of that address: any other name may be one that a
        page of the internet has pointed here (DNS rebinding).
        """
        place = _split(origin)
        if not place.netloc or place.netloc != self.headers.get("Host"):
            return False
        local = ipaddress.ip_address(self.connection.getsockname()[0]).is_loopback
        return not local or _is_address(place.hostname or "")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what ``http.server`` cannot read."""
        if not hasattr(self, "headers"):
            self.headers = HTTPMessage()
        self._refuse(code, SlimError(message or HTTPStatus(code).phrase))

    def generate_response(
        self,
        *arguments: Any,
        tokens: list[int] | None = None,
        token_logprobs: list[float] | None = None,
        top_tokens: list[tuple[JsonObject, ...]] | None = None,
        **words: Any,
    ) -> JsonObject:
        """Return the record of an answer; its log-probabilities are of the tokens it has."""
        record = super().generate_response(*arguments, **words)
        if token_logprobs:
            tops = top_tokens or [()] * len(token_logprobs)
            triples = zip(tokens or (), token_logprobs, tops, strict=True)
            record["choices"][0]["logprobs"] = {
                "content": [
                    {
                        **self._token(token, logprob),
                        "top_logprobs": [
                            self._token(one["id"], one["logprob"])
                            for one in sorted(top, key=lambda one: -one["logprob"])
                        ],
                    }
                    for token, logprob, top in triples
                ]
            }
        return record

    def _token(self, token: int, logprob: float) -> JsonObject:
        text = self.generator.provider.tokenizer.decode([token])
        whole = "\ufffd" not in text  # else its bytes are those of a piece of a character
        return {
            "id": token,
            "token": text,
            "bytes": list(text.encode()) if whole else None,
            "logprob": logprob,
        }

    def handle_completion(self, request: CompletionRequest, stop_words: list[str]) -> None:
        """Answer; what goes wrong before the first byte of it has a status, later ends it."""
        try:
            super().handle_completion(request, stop_words)
        except Refused as refused:
            self._refuse(refused.status, refused.error)
        except OSError:  # the client left
            raise
        except Exception as error:
            failed = SlimError(f"the answer could not be generated: {one_line(error)}")
            if getattr(self, "_headers_buffer", None):  # nothing was sent yet
                self._headers_buffer = []
                self._refuse(500, failed)
            else:
                self.wfile.write(b"data: " + as_error(failed, 500) + b"\n\n")

    def _refuse(self, status: int, error: SlimError) -> None:
        self._reply(status, as_error(error, status))

    def _send(self, status: int, record: Any) -> None:
        self._reply(status, json.dumps(record).encode())

    def _reply(self, status: int, data: bytes) -> None:
        self.close_connection = True  # what the client may still send is not read
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()


def _split(address: str) -> SplitResult:
    """Return the pieces of an address; empty ones of one that is none."""
    try:
        return urlsplit(address)
    except ValueError:
        return SplitResult("", "", "", "", "")


def _is_address(host: str) -> bool:
    """Return whether ``host`` can only be what it says: an IP address, or ``localhost``."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return True

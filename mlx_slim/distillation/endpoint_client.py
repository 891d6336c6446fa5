"""JSON requests to an OpenAI-compatible endpoint, a few at a time, tried again where that helps.

Invariant: everything is bounded: concurrent requests, the wait for each, tries, the size of a
reply. The key is read from the environment, is sent to that one address only (no redirect is
followed), and appears in no message, file or log. An error is one line that quotes the reply.
Try it: ``python -m pytest tests/distillation/test_endpoint.py``.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from mlx_slim.errors import SlimError
from mlx_slim.reading import JsonObject, parse_json

_LARGEST_REPLY = 1 << 24  # bytes
_LONGEST_WAIT = 30.0  # seconds between two tries
_TRANSIENT = {408, 409, 425, 429}  # and every 5xx
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}

Answer = TypeVar("Answer")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any
    ) -> None:
        """Follow nothing: the key is for one address."""


class _Transient(Exception):
    """Worth another try; ``wait``: seconds that the server demands, or None."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


class Unreachable(SlimError):
    """An endpoint that did not answer as often as it was tried."""


class EndpointClient:
    """Sends requests to one path of an endpoint.

    Args:
        name: Of the teacher, in errors.
        base_url: Up to and with ``/v1``.
        path: Behind it, such as ``chat/completions``.
        api_key_env: Environment variable that holds the key, or None.
        concurrency: Requests at a time.
        timeout: Seconds without a byte before a request is given up.
        retries: Tries after the first one, for 429, 5xx and lost connections.
        backoff: Seconds before the second try; doubled each time, at most half a minute.
        saved: What a failure leaves, for the hint.
        largest: Bytes of the largest reply.

    Raises:
        SlimError: No http(s) address, credentials in it, or the key's variable is not set.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        path: str,
        *,
        api_key_env: str | None = None,
        concurrency: int = 4,
        timeout: float = 120.0,
        retries: int = 5,
        backoff: float = 1.0,
        saved: str = "the answers so far are saved",
        largest: int = _LARGEST_REPLY,
    ) -> None:
        self.name = name
        address = _checked_url(base_url)
        self.url = f"{base_url.rstrip('/')}/{path}"
        self._key_name, self._key = api_key_env, _key(api_key_env)
        self._concurrency, self._timeout = concurrency, timeout
        self._retries, self._backoff = retries, backoff
        self._saved, self.largest = saved, largest
        self._stop = threading.Event()
        handlers: list[Any] = [_NoRedirect()]
        if address.hostname in _LOOPBACK:  # a proxy cannot reach it
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def map(
        self, payloads: Sequence[JsonObject], read: Callable[[bytes], Answer]
    ) -> Iterator[Answer]:
        """Yield what ``read`` makes of the replies, in order, a few requests ahead.

        Raises:
            SlimError: If a reply cannot be had or read; those before it were yielded.
            Unreachable: If the endpoint does not answer.
        """
        stop = self._stop = threading.Event()
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        futures: list[Future[Answer]] = [Future() for _ in payloads]
        for index in range(len(payloads)):
            waiting.put(index)

        def work() -> None:
            while not stop.is_set():
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    futures[index].set_result(read(self.ask(payloads[index], stop)))
                except BaseException as error:
                    stop.set()  # requests before this one are answered or being sent
                    futures[index].set_exception(error)

        # Daemon threads, so that Ctrl-C does not wait for a server.
        for _ in range(min(self._concurrency, len(payloads))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for future in futures:
                yield future.result()
        finally:
            stop.set()

    def close(self) -> None:
        """Send no further request."""
        self._stop.set()

    def ask(self, payload: JsonObject, stop: threading.Event | None = None) -> bytes:
        """Return the reply to one request.

        Raises:
            SlimError: If it is refused.
            Unreachable: If it fails as often as it may be tried.
        """
        body = json.dumps(payload, ensure_ascii=False).encode("utf-8", "replace")
        stop = stop or threading.Event()
        attempt = 0
        while True:
            try:
                return self._post(body)
            except _Transient as error:
                attempt += 1
                if attempt > self._retries or stop.is_set():
                    tries = "1 try" if attempt == 1 else f"{attempt} tries"
                    raise Unreachable(
                        f"teacher {self.name}: {self.url}: {error} ({tries})",
                        f"start the server, or raise distill.ask.timeout; {self._saved}",
                    ) from None
                wait = self._backoff * 2 ** (attempt - 1) if error.wait is None else error.wait
            stop.wait(min(wait, _LONGEST_WAIT))

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "mlx-slim"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout) as reply:
                data = self._body(reply)
                if len(data) <= self.largest and _is_cut(reply, data):
                    raise _Transient(f"the reply was cut short after {len(data):,} bytes")
                return data
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None
        except TimeoutError:
            raise _Transient(f"no answer within {self._timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _Transient(f"no answer within {self._timeout:g} s") from None
            text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            raise _Transient(self.safe(text)) from None

    def _body(self, reply: http.client.HTTPResponse) -> bytes:
        """Return the reply; the whole of it, not only each block, must come within the timeout."""
        data, until = bytearray(), time.monotonic() + self._timeout
        while len(data) <= self.largest and (block := reply.read1(1 << 16)):
            data += block
            if time.monotonic() > until:
                raise TimeoutError
        return bytes(data)

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        """Return what an HTTP error means."""
        try:
            detail = self.safe(error.read(4096).decode("utf-8", "replace"))
        except (OSError, http.client.HTTPException):
            detail = ""
        what = f"{error.code} {http.client.responses.get(error.code, '')}".strip()
        what += f": {detail}" if detail else ""
        if error.code in _TRANSIENT or error.code >= 500:
            after = error.headers.get("Retry-After", "")
            return _Transient(what, float(after) if after.strip().isdecimal() else None)
        where = f"teacher {self.name}: {self.url}"
        if error.code < 400:
            place = self.safe(error.headers.get("Location", "nowhere"))
            return SlimError(
                f"{where} redirects ({error.code}) to {place}, which is not followed",
                "set base_url to the address of the server itself",
            )
        hint = "check base_url (it ends in /v1) and model"
        if error.code in (401, 403):
            hint = "set api_key_env to the environment variable that holds the key"
            hint = f"check the key in {self._key_name}" if self._key_name else hint
        return SlimError(f"{where} answered {what}", hint)

    def safe(self, text: str) -> str:
        """Return a server's text as one short line, without the key."""
        line = " ".join(text.split())
        line = line.replace(self._key, "***") if self._key else line
        return line[:200]


def _is_cut(reply: http.client.HTTPResponse, data: bytes) -> bool:
    """Return whether a connection ended before its reply did."""
    if reply.length is not None:  # bytes of Content-Length that are missing
        return reply.length > 0
    if reply.chunked or not data.lstrip().startswith(b"{"):
        return False
    try:  # it ends with the connection: only the JSON tells
        parse_json(data, "")
    except SlimError:
        return True
    return False


def _checked_url(base_url: str) -> SplitResult:
    try:
        address = urlsplit(base_url)
        _ = address.port
    except ValueError as error:
        raise SlimError(f"base_url={base_url!r} is not a valid address: {error}") from error
    if address.username or address.password or address.query or address.fragment:
        raise SlimError(
            "base_url must not contain a user, password or query",
            "put the key into an environment variable and set api_key_env to its name",
        )
    if address.scheme not in ("http", "https") or not address.hostname:
        raise SlimError(
            f"base_url={base_url!r} is not an http(s) address",
            "an example: http://127.0.0.1:8080/v1",
        )
    return address


def _key(variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise SlimError(f"api_key_env: the environment variable {variable} is not set")
    if not key.isascii() or not key.isprintable():
        raise SlimError(
            f"api_key_env: the key in {variable} has characters outside printable ASCII"
        )
    return key

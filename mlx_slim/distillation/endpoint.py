"""A teacher behind an OpenAI-compatible endpoint: llama.cpp, Ollama, mlx_lm.server, vLLM, others.

Invariant: everything is bounded: concurrent requests, the wait for each, tries, the size of a
reply. The key is read from the environment, is sent to that one address only (no redirect is
followed), and appears in no message, file or log. An error is one line that quotes the reply.
Try it: ``mlx_lm.server``, then ``mlx-slim distill RECIPE
"distill.teachers=[{base_url: http://127.0.0.1:8080/v1, model: NAME}]"``.
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
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any
from urllib.parse import SplitResult, urlsplit

from mlx_slim.data.conversations import with_text_arguments
from mlx_slim.errors import SlimError
from mlx_slim.reading import ChatMessage, JsonObject, parse_json

_LARGEST_REPLY = 1 << 24  # bytes
_LONGEST_WAIT = 30.0  # seconds between two tries
_TRANSIENT = {408, 409, 425, 429}  # and every 5xx
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_REASONS = {"length": "length", "stop": "eos"}


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


class EndpointTeacher:
    """A model that a server runs.

    Args:
        name: In the lines of ``answers.jsonl``.
        base_url: Up to and with ``/v1``.
        model: As the server calls it.
        api_key_env: Environment variable that holds the key, or None.
        max_tokens: Longest answer, tokens.
        until: Texts that end an answer.
        concurrency: Requests at a time.
        timeout: Seconds without a byte before a request is given up.
        retries: Tries after the first one, for 429, 5xx and lost connections.
        backoff: Seconds before the second try; doubled each time, at most half a minute.

    Raises:
        SlimError: No http(s) address, credentials in it, or the key's variable is not set.
    """

    chunk = 64
    batch_dependent = False

    def __init__(
        self,
        name: str,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        max_tokens: int,
        until: Sequence[str] = (),
        concurrency: int = 4,
        timeout: float = 120.0,
        retries: int = 5,
        backoff: float = 1.0,
    ) -> None:
        self.name, self.truncated = name, 0
        address = _checked_url(base_url)
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._key_name, self._key = api_key_env, _key(api_key_env)
        self._concurrency, self._timeout = concurrency, timeout
        self._retries, self._backoff = retries, backoff
        self._settings = {
            "base_url": base_url.rstrip("/"),
            "model": model,
            "max_tokens": max_tokens,
            "until": list(until),
        }
        self._stop = threading.Event()
        handlers: list[Any] = [_NoRedirect()]
        if address.hostname in _LOOPBACK:  # a proxy cannot reach it
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    @property
    def settings(self) -> JsonObject:
        """Address, model, ``max_tokens`` and ``until``."""
        return self._settings

    def answer(self, prompts: Sequence[list[ChatMessage]]) -> Iterator[tuple[str, str]]:
        """Yield the answers in order, a few requests ahead.

        Raises:
            SlimError: If an answer cannot be had; those before it were yielded.
        """
        stop = self._stop = threading.Event()
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        futures: list[Future[tuple[str, str]]] = [Future() for _ in prompts]
        for index in range(len(prompts)):
            waiting.put(index)

        def work() -> None:
            while not stop.is_set():
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    futures[index].set_result(self._ask(prompts[index], stop))
                except BaseException as error:
                    stop.set()  # requests before this one are answered or being sent
                    futures[index].set_exception(error)

        # Daemon threads, so that Ctrl-C does not wait for a server.
        for _ in range(min(self._concurrency, len(prompts))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for future in futures:
                yield future.result()
        finally:
            stop.set()

    def close(self) -> None:
        """Send no further request."""
        self._stop.set()

    def _ask(self, messages: list[ChatMessage], stop: threading.Event) -> tuple[str, str]:
        payload: JsonObject = {
            "model": self._settings["model"],
            "messages": with_text_arguments(messages),
            "max_tokens": self._settings["max_tokens"],
            "temperature": 0,
            "stream": False,
        }
        if self._settings["until"]:
            payload["stop"] = self._settings["until"]
        body = json.dumps(payload, ensure_ascii=False).encode("utf-8", "replace")
        attempt = 0
        while isinstance(result := self._try(body), _Transient):
            attempt += 1
            if attempt > self._retries or stop.is_set():
                tries = "1 try" if attempt == 1 else f"{attempt} tries"
                raise SlimError(
                    f"teacher {self.name}: {self._url}: {result} ({tries})",
                    "start the server, or raise distill.ask.timeout; the answers so far are saved",
                )
            wait = self._backoff * 2 ** (attempt - 1) if result.wait is None else result.wait
            stop.wait(min(wait, _LONGEST_WAIT))
        return result

    def _try(self, body: bytes) -> tuple[str, str] | _Transient:
        try:
            return self._read(self._post(body))
        except _Transient as error:
            return error

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "mlx-slim"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout) as reply:
                data = self._body(reply)
                if len(data) <= _LARGEST_REPLY and _is_cut(reply, data):
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
            raise _Transient(self._safe(text)) from None

    def _body(self, reply: http.client.HTTPResponse) -> bytes:
        """Return the reply; the whole of it, not only each block, must come within the timeout."""
        data, until = bytearray(), time.monotonic() + self._timeout
        while len(data) <= _LARGEST_REPLY and (block := reply.read1(1 << 16)):
            data += block
            if time.monotonic() > until:
                raise TimeoutError
        return bytes(data)

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        """Return what an HTTP error means."""
        try:
            detail = self._safe(error.read(4096).decode("utf-8", "replace"))
        except (OSError, http.client.HTTPException):
            detail = ""
        what = f"{error.code} {http.client.responses.get(error.code, '')}".strip()
        what += f": {detail}" if detail else ""
        if error.code in _TRANSIENT or error.code >= 500:
            after = error.headers.get("Retry-After", "")
            return _Transient(what, float(after) if after.strip().isdecimal() else None)
        where = f"teacher {self.name}: {self._url}"
        if error.code < 400:
            place = self._safe(error.headers.get("Location", "nowhere"))
            return SlimError(
                f"{where} redirects ({error.code}) to {place}, which is not followed",
                "set base_url to the address of the server itself",
            )
        hint = "check base_url (it ends in /v1) and model"
        if error.code in (401, 403):
            hint = "set api_key_env to the environment variable that holds the key"
            hint = f"check the key in {self._key_name}" if self._key_name else hint
        return SlimError(f"{where} answered {what}", hint)

    def _read(self, data: bytes) -> tuple[str, str]:
        """Return text and stop reason of a chat completion."""
        try:
            if len(data) > _LARGEST_REPLY:
                raise ValueError("too long")
            choice = parse_json(data, "the reply")["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
            if not isinstance(text, str | None) or not isinstance(reason, str | None):
                raise TypeError("content or finish_reason is not text")
        except (SlimError, ValueError, LookupError, TypeError, AttributeError):
            text = self._safe(data[:4096].decode("utf-8", "replace"))
            raise SlimError(
                f"teacher {self.name}: {self._url} did not return a chat completion: "
                f"{text or 'nothing'}",
                "check base_url: it should end in /v1",
            ) from None
        return text or "", _REASONS.get(reason or "", "eos")

    def _safe(self, text: str) -> str:
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

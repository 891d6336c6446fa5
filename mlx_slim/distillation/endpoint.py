"""A teacher behind an OpenAI-compatible endpoint: llama.cpp, Ollama, mlx_lm.server, vLLM, others.

Invariant: its answers are those of chat completions at temperature 0, and its settings hold all
that decides them and no secret; requests are bounded and tried again (``endpoint_client.py``).
Try it: ``mlx_lm.server``, then ``mlx-slim distill RECIPE
"distill.teachers=[{base_url: http://127.0.0.1:8080/v1, model: NAME}]"``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlx_slim.data.conversations import with_text_arguments
from mlx_slim.distillation.endpoint_client import EndpointClient
from mlx_slim.errors import SlimError
from mlx_slim.reading import ChatMessage, JsonObject, parse_json

_REASONS = {"length": "length", "stop": "eos"}


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
        self._client = EndpointClient(
            name,
            base_url,
            "chat/completions",
            api_key_env=api_key_env,
            concurrency=concurrency,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
        )
        self._settings = {
            "base_url": base_url.rstrip("/"),
            "model": model,
            "max_tokens": max_tokens,
            "until": list(until),
        }

    @property
    def settings(self) -> JsonObject:
        """Address, model, ``max_tokens`` and ``until``."""
        return self._settings

    def answer(self, prompts: Sequence[list[ChatMessage]]) -> Iterator[tuple[str, str]]:
        """Yield the answers in order, a few requests ahead.

        Raises:
            SlimError: If an answer cannot be had; those before it were yielded.
        """
        return self._client.map([self._payload(messages) for messages in prompts], self._read)

    def close(self) -> None:
        """Send no further request."""
        self._client.close()

    def _payload(self, messages: list[ChatMessage]) -> JsonObject:
        payload: JsonObject = {
            "model": self._settings["model"],
            "messages": with_text_arguments(messages),
            "max_tokens": self._settings["max_tokens"],
            "temperature": 0,
            "stream": False,
        }
        if self._settings["until"]:
            payload["stop"] = self._settings["until"]
        return payload

    def _read(self, data: bytes) -> tuple[str, str]:
        """Return text and stop reason of a chat completion."""
        try:
            if len(data) > self._client.largest:
                raise ValueError("too long")
            choice = parse_json(data, "the reply")["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
            if not isinstance(text, str | None) or not isinstance(reason, str | None):
                raise TypeError("content or finish_reason is not text")
        except (SlimError, ValueError, LookupError, TypeError, AttributeError):
            text = self._client.safe(data[:4096].decode("utf-8", "replace"))
            raise SlimError(
                f"teacher {self.name}: {self._client.url} did not return a chat completion: "
                f"{text or 'nothing'}",
                "check base_url: it should end in /v1",
            ) from None
        return text or "", _REASONS.get(reason or "", "eos")

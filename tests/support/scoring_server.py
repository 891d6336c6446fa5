"""A stand-in for servers that score given texts, over a real tiny model: both protocols."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_slim.models.load import load
from mlx_slim.models.logits import logsumexp
from tests.support.endpoint import Reply


class ScoringServer:
    """Answers ``/v1/completions`` as vLLM does.

    Args:
        folder: Of the model.
        protocols: Those that it knows; another is ignored, as servers do.
        token_ids: Whether an echo can write ``token_id:N`` in place of texts.
        most: Most log-probabilities of a token.
    """

    def __init__(
        self,
        folder: Path,
        protocols: tuple[str, ...] = ("prompt_logprobs", "echo"),
        *,
        token_ids: bool = True,
        most: int = 1000,
    ) -> None:
        loaded = load(folder, dtype=mx.float32)
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._protocols, self._token_ids, self._most = protocols, token_ids, most
        self._lock = threading.Lock()

    def __call__(self, number: int, body: dict[str, Any]) -> Reply:
        """Return a completion, with the log-probabilities of its prompt if they are asked for."""
        ids = body["prompt"]
        k = body.get("prompt_logprobs", body.get("logprobs", 0))
        if k > self._most:
            return 400, {"message": f"requested {k}, more than the allowed {self._most}"}, {}
        choice: dict[str, Any] = {"text": "x", "finish_reason": "length"}
        with self._lock:
            logits_TV = self._model(mx.array([ids]))[0]
            logs_TV = np.array(logits_TV - logsumexp(logits_TV))
        if "prompt_logprobs" in body and "prompt_logprobs" in self._protocols:
            choice["prompt_logprobs"] = [None, *self._maps(ids, logs_TV, k)]
        if body.get("echo") and "echo" in self._protocols:
            choice["logprobs"] = self._echo(ids, logs_TV, k, body)
        return 200, {"choices": [choice]}, {}

    def _maps(self, ids: list[int], logs_TV: np.ndarray, k: int) -> list[dict[str, Any]]:
        maps = []
        for token, logs in zip(ids[1:], logs_TV, strict=False):
            order = np.argsort(-logs)
            chosen = [*order[:k].tolist(), *([token] if token not in order[:k] else [])]
            maps.append(
                {
                    str(one): {
                        "logprob": float(logs[one]),
                        "rank": int(np.flatnonzero(order == one)[0]) + 1,
                        "decoded_token": self._tokenizer.decode([one]),
                    }
                    for one in chosen
                }
            )
        return maps

    def _echo(
        self, ids: list[int], logs_TV: np.ndarray, k: int, body: dict[str, Any]
    ) -> dict[str, Any]:
        def key(token: int) -> str:
            if body.get("return_tokens_as_token_ids") and self._token_ids:
                return f"token_id:{token}"
            return self._tokenizer.decode([token])

        tops: list[Any] = [None]
        for logs in logs_TV[:-1]:
            best = np.argsort(-logs)[:k].tolist()
            # Of tokens with one text, the likeliest comes last and stays.
            tops.append({key(one): float(logs[one]) for one in reversed(best)})
        token_logs = [
            None,
            *(float(log[token]) for token, log in zip(ids[1:], logs_TV, strict=False)),
        ]
        return {
            "tokens": [key(one) for one in ids],
            "token_logprobs": token_logs,
            "top_logprobs": tops,
        }

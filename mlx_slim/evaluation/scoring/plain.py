"""Scoring the slow, plain way: one sequence at a time, no cache, log-softmax in float64.

What the fast engine is compared with. Nothing of the engine is used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np


def plain_logits(model: Any, ids: Sequence[int]) -> np.ndarray:
    """Return the logits (T, V) after each of ``ids``, float64, from one pass without a cache."""
    return np.array(model(mx.array([list(ids)])).astype(mx.float32))[0].astype(np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities over the last axis, float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def plain_score(model: Any, ids: Sequence[int], start: int) -> tuple[float, bool]:
    """Return Σ log p of ``ids[start:]`` after what stands before them, and whether all are greedy.

    Args:
        model: Any mlx-lm model.
        ids: Context and continuation.
        start: Index of the first scored id.
    """
    logp_TV = log_softmax(plain_logits(model, ids[:-1]))
    targets = np.array(ids[start:])
    rows = np.arange(start - 1, len(ids) - 1)
    greedy = bool((logp_TV[rows].argmax(axis=-1) == targets).all())
    return float(logp_TV[rows, targets].sum()), greedy


def plain_generate(
    model: Any, tokenizer: Any, prompt: Sequence[int], max_tokens: int, stops: Sequence[str] = ()
) -> tuple[str, str]:
    """Return the greedy answer to ``prompt`` before its stop, and why it ended."""
    ids: list[int] = []
    while len(ids) < max_tokens:
        best = int(plain_logits(model, [*prompt, *ids])[-1].argmax())
        if best in tokenizer.eos_token_ids:
            return tokenizer.decode(ids, skip_special_tokens=True), "eos"
        ids.append(best)
        text = tokenizer.decode(ids)
        ends = [text.find(stop) for stop in stops if stop in text]
        if ends:
            text = tokenizer.decode(ids, skip_special_tokens=True)
            cut = [text.find(stop) for stop in stops if stop in text]
            return text[: min(cut, default=None)], "until"
    return tokenizer.decode(ids, skip_special_tokens=True), "length"

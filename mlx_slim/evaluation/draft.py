"""Speculative decoding: a small model drafts tokens, the model checks several in one pass.

Invariant: the model decides every token, so a greedy answer is the one without a draft (up to the
rounding of sums of other shapes), and a draft that is bad only costs time. It must have the model's
tokenizer, and both must have caches that can be cut back to any length. Try it:
``mlx-slim generate MODEL --draft-model STUDENT --prompt "Name three fruits."``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList, KVCache, QuantizedKVCache, make_prompt_cache

from mlx_slim import runtime
from mlx_slim.data.tokenizer_difference import tokenizer_difference
from mlx_slim.errors import SlimError
from mlx_slim.models.load import load, load_tokenizer, resolve
from mlx_slim.models.quantized import densify, densify_pays

_STEPS = 16  # decoding steps whose time stands for the speed without a draft


@dataclass(frozen=True)
class DraftFigures:
    """What a draft was worth, over one answer or several.

    Attributes:
        proposed: Tokens that the draft proposed.
        accepted: Those of them that the model chose too.
        tokens: Tokens of the answers whose time was taken.
        seconds: Of these tokens.
        plain_seconds: Of one token without the draft; None is not measured.
    """

    proposed: int = 0
    accepted: int = 0
    tokens: int = 0
    seconds: float = 0.0
    plain_seconds: float | None = None

    def __add__(self, other: DraftFigures) -> DraftFigures:
        """Return the figures over both."""
        return DraftFigures(
            self.proposed + other.proposed,
            self.accepted + other.accepted,
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            self.plain_seconds if other.plain_seconds is None else other.plain_seconds,
        )

    @property
    def speedup(self) -> float | None:
        """Tokens per second with the draft, as a multiple of those without; None: not measured."""
        if not self.plain_seconds or not self.tokens:
            return None
        return self.plain_seconds * self.tokens / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        """Return it in words."""
        rate = self.accepted / max(1, self.proposed)
        text = (
            f"draft: {self.accepted:,} of {self.proposed:,} proposed tokens accepted ({rate:.0%})"
        )
        speedup = self.speedup
        return text if speedup is None else f"{text}, {speedup:.2f} x the speed without it"


class DraftCount:
    """Counts what a draft proposes and what is accepted while an answer is generated.

    Args:
        most: Longest answer, tokens.
        width: Tokens that the draft proposes at a time.
    """

    def __init__(self, most: int, width: int) -> None:
        self._most, self._width = most, width
        self._proposed = self._accepted = self._tokens = self._first = 0
        self._begin = self._end = 0.0
        self._round = True  # whether the next token begins a round of drafting and checking

    def watch(self, responses: Iterator[Any]) -> Iterator[Any]:
        """Yield mlx-lm's ``responses``, counted. One that repeats its token ends them."""
        for response in responses:
            if response.generation_tokens > self._tokens:
                self._count(response)
            yield response

    def _count(self, response: Any) -> None:
        now = time.perf_counter()
        if self._round:
            if self._tokens and not self._first:  # the tokens of a round come at once
                self._first, self._begin = self._tokens, self._end
            self._proposed += min(self._most - self._tokens, self._width)
        self._accepted += response.from_draft
        self._tokens = response.generation_tokens
        self._round, self._end = not response.from_draft, now

    @property
    def figures(self) -> DraftFigures:
        """So far; the time is that of the rounds after the first."""
        timed = self._tokens - self._first if self._first else 0
        seconds = self._end - self._begin if timed else 0.0
        return DraftFigures(self._proposed, self._accepted, timed, seconds)


def open_draft(source: str | Path, model: nn.Module, tokenizer: Any, name: str) -> nn.Module:
    """Load a draft for ``model``.

    Args:
        source: Folder or hub id.
        model: The model that decides.
        tokenizer: Its tokenizer.
        name: Of that model, for messages.

    Raises:
        SlimError: If the draft cannot be loaded or used: another tokenizer, or a cache of either
            that cannot be cut back.
    """
    check_trimmable(model, name)
    other = load_tokenizer(resolve(source))
    difference = tokenizer_difference(tokenizer, other, ("model", "draft"))
    if difference is not None and difference.encodings:
        raise SlimError(
            f"{source} cannot draft for {name}: {difference.text}",
            "draft with a smaller model of its family, or with one pruned or distilled from it",
        )
    draft = load(source, dtype=None if runtime.on_gpu() else mx.float32).model
    check_trimmable(draft, str(source))
    if densify_pays(draft):
        densify(draft)
    draft.eval()
    return draft


def check_trimmable(model: Any, name: str) -> None:
    """Refuse a model whose cache cannot be cut back to any length.

    Raises:
        SlimError: Names the kinds of its caches.
    """
    caches = make_prompt_cache(model)
    kinds = sorted({type(cache).__name__ for cache in caches if not _trimmable(cache)})
    if kinds or len(caches) != len(model.layers):
        why = f"it is a {' and a '.join(kinds)}" if kinds else "layers share theirs"
        raise SlimError(
            f"{name} cannot be used with a draft: its cache cannot be cut back ({why})",
            "leave --draft-model out",
        )


def _trimmable(cache: Any) -> bool:
    """Return whether it can be cut at any time: a rotating one only can until it is full."""
    if isinstance(cache, CacheList):
        return all(map(_trimmable, cache.caches))
    return isinstance(cache, (KVCache, QuantizedKVCache))


def seconds_without_draft(model: nn.Module, ids: list[int]) -> float:
    """Return the seconds of one decoding step of ``model`` alone.

    Args:
        model: Without a draft.
        ids: Tokens to begin with, at least one.
    """
    from mlx_lm.generate import generate_step

    times = [
        time.perf_counter()
        for _ in generate_step(mx.array(ids), model, max_tokens=_STEPS + 1)  # the first: the prompt
    ]
    return (times[-1] - times[0]) / _STEPS

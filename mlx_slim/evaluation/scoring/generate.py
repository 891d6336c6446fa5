"""Greedy answers to many prompts at once, on mlx-lm's continuous batching.

Invariant: a prompt's answer does not depend on the other prompts of its batch or on the batch size
(up to the rounding of float sums), and answers come back in the order of the prompts. The prefix
that all prompts share (a system message, few-shot examples) is computed once and, where the model
allows it, stored once; the batch size follows from the bytes of the caches, and is 1 where padding
would change a model's state. On a CPU, call ``models.quantized.densify`` first when memory allows:
a decoding step has few rows, so dequantizing the weights in every step would cost more than the
step itself. Try it: ``mlx-slim demo``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_slim import runtime
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.scoring.answer_cache import (
    PREFILL_TOKENS,
    Prefix,
    footprint,
    joins,
    shared_attention,
    supports_shared_prefix,
)
from mlx_slim.evaluation.scoring.prefix_tree import fewest_tokens
from mlx_slim.evaluation.scoring.requests import Request, shared_length
from mlx_slim.models.kv_cache import KVFormat, rounded_caches
from mlx_slim.progress import stage

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

MOST_ANSWERS = 64  # of a batch: more gain little
PREFILL = 4  # prompts of one prefill: of similar length, so that little is padding
MIN_SHARED = 8  # a shorter common prefix is not worth a forward pass of its own


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: The answer without special tokens, cut before a stop string.
        ids: Its token ids, without the stop token; with those of a stop string.
        stop_reason: ``eos`` (a stop token came), ``until`` (a stop string came) or ``length``
            (``max_tokens`` was reached).
    """

    text: str
    ids: list[int]
    stop_reason: Literal["eos", "until", "length"]


@dataclass
class GenerationCounts:
    """Positions that went through the model.

    Attributes:
        computed: All of them, padding included.
        minimum: The fewest possible: every distinct prefix of the prompts once, and every answer.
    """

    computed: int = 0
    minimum: int = 0


class _Counted:
    """A model that counts the positions it computes."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.positions = 0

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        self.positions += tokens.size
        return cast(Any, self._model)(tokens, cache=cache)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def generate_batch(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop_ids: Collection[int] | None = None,
    *,
    stops: Sequence[str] = (),
    batch_size: int = MOST_ANSWERS,
    cache_bytes: int | None = None,
    tally: GenerationCounts | None = None,
    kv_format: KVFormat | None = None,
) -> list[Generation]:
    """Return the greedy answer to each prompt, in order.

    Args:
        model: Any mlx-lm model; not changed.
        tokenizer: Decodes the answers.
        prompts: Token ids, special tokens included, at least one each.
        max_tokens: Longest answer, tokens.
        stop_ids: Tokens that end an answer; None takes the tokenizer's own.
        stops: Strings that end an answer, also across tokens; the row leaves the batch
            at once.
        batch_size: Most answers generated in one batch.
        cache_bytes: Limit of keys, values and logits, without the weights; the batch is smaller
            where they would not fit, and at least 1. None takes what the
            device's memory budget leaves.
        tally: Counts the positions computed.
        kv_format: What keys and values are rounded to; None leaves them.

    Raises:
        SlimError: If a prompt is empty.
    """
    from mlx_lm.generate import BatchGenerator

    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise SlimError(f"prompt {index} has no tokens", "every prompt needs at least one")
    ends = set(tokenizer.eos_token_ids if stop_ids is None else stop_ids)
    until = _Until(tokenizer, stops)
    # Longest first: memory peaks at once, and prompts of one batch are of similar length.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    shared = _shared_prefix(prompts)
    counted = _Counted(model)
    once = bool(shared) and supports_shared_prefix(model)
    if prompts:
        if cache_bytes is None:
            cache_bytes = runtime.memory_budget("auto") - mx.get_active_memory()
        longest = max(map(len, prompts)) - shared + max_tokens
        batch_size = min(batch_size, footprint(model).answers(cache_bytes, longest, shared, once))
    if batch_size > 1 and len(prompts) > 1 and not joins(model):
        batch_size = 1
    caches: list[list[Any]] | None = None
    if shared:
        caches = [_prefill(counted, list(prompts[0][:shared]), once, kv_format)] * len(prompts)
    elif kv_format is not None:
        caches = [rounded_caches(model, kv_format) for _ in prompts]
    prefill_batch = max(1, min(PREFILL, batch_size // 2))
    generator = BatchGenerator(
        cast(nn.Module, counted),
        stop_tokens=[[end] for end in ends],
        completion_batch_size=max(
            1, batch_size - prefill_batch
        ),  # besides the prompts of the prefill
        prefill_batch_size=prefill_batch,
        prefill_step_size=PREFILL_TOKENS,
    )
    ids: dict[int, list[int]] = {}
    reasons: dict[int, Literal["eos", "until", "length"]] = {}
    with contextlib.ExitStack() as open_until_done:
        open_until_done.callback(generator.close)
        answering = open_until_done.enter_context(stage("answering", len(prompts), "questions"))
        uids = generator.insert(
            [list(prompts[index][shared:]) for index in order],
            max_tokens=[max_tokens] * len(order),
            caches=caches,
        )
        row_of = dict(zip(uids, order, strict=True))
        ids = {index: [] for index in order}
        while responses := _next(generator, model, once):
            stopped: list[int] = []
            for response in responses:
                index = row_of[response.uid]
                if response.finish_reason == "stop":
                    reasons[index] = "eos"
                    continue
                ids[index].append(response.token)
                if until.reached(ids[index]):
                    reasons[index] = "until"
                    if response.finish_reason is None:
                        stopped.append(response.uid)
                elif response.finish_reason == "length":
                    reasons[index] = "length"
            if stopped:
                generator.remove(stopped)
            growing = sum(len(ids[i]) for i in ids if i not in reasons)
            answering.reach(len(reasons) + growing / (max_tokens + 1))
    if tally is not None:
        tally.computed += counted.positions
        sampled = sum(len(ids[i]) + (reasons[i] == "eos") - 1 for i in ids)
        tally.minimum += sampled + fewest_tokens([Request((*p, 0), len(p)) for p in prompts])
    return [
        Generation(until.cut(ids[index]), ids[index], reasons[index])
        for index in range(len(prompts))
    ]


class _Until:
    """Finds stop strings in growing answers."""

    def __init__(self, tokenizer: TokenizerWrapper, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        # A token is at least a byte: a stop lies in its last so many tokens, and two for a
        # character that is cut at the front.
        self._window = max((len(stop.encode()) for stop in self._stops), default=0) + 2

    def reached(self, ids: list[int]) -> bool:
        """Return whether a stop string is complete with the last token."""
        if not self._stops:
            return False
        tail = self._tokenizer.decode(ids[-self._window :])
        return any(stop in tail for stop in self._stops)

    def cut(self, ids: list[int]) -> str:
        """Return the text before the first stop string, without special tokens."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text[: min((at for s in self._stops if (at := text.find(s)) >= 0), default=None)]


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many leading tokens all prompts share, their last token excepted."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts, key=list), max(prompts, key=list)  # enough: order is lexicographic
    length = min(shared_length(first, last), min(len(prompt) for prompt in prompts) - 1)
    return length if length >= MIN_SHARED else 0


def _next(generator: Any, model: nn.Module, once: bool) -> list[Any]:
    with shared_attention(model) if once else contextlib.nullcontext():
        return generator.next_generated()


def _prefill(model: Any, ids: list[int], once: bool, kv_format: KVFormat | None) -> list[Prefix]:
    """Return the prompt cache after ``ids``, to be shared or copied."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model) if kv_format is None else rounded_caches(model, kv_format)
    for begin in range(0, len(ids), PREFILL_TOKENS):
        model(mx.array([ids[begin : begin + PREFILL_TOKENS]]), cache=cache)
        mx.eval([layer.state for layer in cache])
    return [Prefix(layer, once) for layer in cache]

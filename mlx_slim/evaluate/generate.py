"""Greedy answers to many prompts at once, on mlx-lm's continuous batching.

Invariant: a prompt's answer does not depend on which prompts are beside it or on the batch size
(up to the rounding of float sums), and answers come back in the order of the prompts. The prefix
that all prompts share (a system message, few-shot examples) is computed once. On a CPU, call
``models.quantized.densify`` first when memory allows: a decoding step has few rows, so rebuilding
quantized weights in every step would cost more than the step itself. Try it: ``mlx-slim demo``.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.errors import SlimError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

MIN_SHARED = 8  # a shorter common prefix is not worth a forward pass of its own


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: The answer without its stop token.
        ids: Its token ids, without the stop token.
        stop_reason: ``eos`` (a stop token came) or ``length`` (``max_tokens`` was reached).
    """

    text: str
    ids: list[int]
    stop_reason: Literal["eos", "length"]


def generate_batch(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop_ids: Collection[int] | None = None,
    *,
    batch_size: int = 64,
) -> list[Generation]:
    """Return the greedy answer to each prompt, in order.

    Args:
        model: Any mlx-lm model; not changed.
        tokenizer: Decodes the answers.
        prompts: Token ids, special tokens included, at least one each.
        max_tokens: Longest answer, tokens.
        stop_ids: Tokens that end an answer; None takes the tokenizer's own.
        batch_size: Answers that grow side by side.

    Raises:
        SlimError: If a prompt is empty.
    """
    from mlx_lm.generate import BatchGenerator

    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise SlimError(f"prompt {index} has no tokens", "every prompt needs at least one")
    stops = set(tokenizer.eos_token_ids if stop_ids is None else stop_ids)
    # Longest first: memory peaks at once, and prompts of one batch are of like length.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    shared = _shared_prefix(prompts)
    prefix = _prefill(model, list(prompts[0][:shared])) if shared else None
    generator = BatchGenerator(
        model,
        stop_tokens=[[stop] for stop in stops],
        completion_batch_size=batch_size,
        prefill_batch_size=batch_size,
    )
    ids: dict[int, list[int]] = {}
    reasons: dict[int, Literal["eos", "length"]] = {}
    try:
        uids = generator.insert(
            [list(prompts[index][shared:]) for index in order],
            max_tokens=[max_tokens] * len(order),
            caches=[copy.deepcopy(prefix) for _ in order] if prefix else None,
        )
        row_of = dict(zip(uids, order, strict=True))
        ids = {index: [] for index in order}
        while responses := generator.next_generated():
            for response in responses:
                index = row_of[response.uid]
                if response.finish_reason == "stop":
                    reasons[index] = "eos"
                    continue
                ids[index].append(response.token)
                if response.finish_reason == "length":
                    reasons[index] = "length"
    finally:
        generator.close()
    return [
        Generation(tokenizer.decode(ids[index]), ids[index], reasons[index])
        for index in range(len(prompts))
    ]


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many leading tokens all prompts share, their last token excepted."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts, key=list), max(prompts, key=list)  # enough: order is lexicographic
    length = 0
    for a, b in zip(first, last, strict=False):
        if a != b:
            break
        length += 1
    length = min(length, min(len(prompt) for prompt in prompts) - 1)
    return length if length >= MIN_SHARED else 0


def _prefill(model: nn.Module, ids: list[int]) -> list[Any]:
    """Return the prompt cache after ``ids``."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    model(mx.array([ids]), cache=cache)
    mx.eval([layer.state for layer in cache])
    return cache

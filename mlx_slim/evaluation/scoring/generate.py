"""Answers to many prompts at once, greedy or sampled, on mlx-lm's continuous batching.

Invariant: a prompt's answer does not depend on the other prompts of its batch or on the batch size
(up to the rounding of float sums), also where it is sampled (``sampling.py``), and answers come
back in the order of the prompts. The prefix that all prompts share (a system message, few-shot
examples) is computed once and, where the model allows it, stored once; so is a prompt that is
answered several times. The batch size follows from the bytes of the caches, and is 1 where padding
would change a model's state. On a CPU, call ``models.quantized.densify`` first when memory allows:
a decoding step has few rows, so dequantizing the weights in every step would cost more than the
step itself. Try it: ``mlx-slim demo``.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_slim import blas, runtime
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
from mlx_slim.evaluation.scoring.sampling import AnswerSampler, Sampling
from mlx_slim.models.host_exponentials import host_exponentials
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
        stop_token: The stop token that came, if one did.
        log_probs: Of ``drawn``, on request: nats, at the sampling temperature.
    """

    text: str
    ids: list[int]
    stop_reason: Literal["eos", "until", "length"]
    stop_token: int | None = None
    log_probs: list[float] | None = None

    @property
    def drawn(self) -> list[int]:
        """All token ids that the model chose: ``ids``, and the stop token."""
        return self.ids if self.stop_token is None else [*self.ids, self.stop_token]


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
    """A model that counts the positions it computes.

    ``exact``: in float32, whose normalization bfloat16 would round; greedy answers need none.
    """

    def __init__(self, model: nn.Module, exact: bool) -> None:
        self._model = model
        self._exact = exact
        self.positions = 0

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        self.positions += tokens.size
        logits = cast(Any, self._model)(tokens, cache=cache)
        return logits.astype(mx.float32) if self._exact else logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def generate_batch(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | Sequence[int],
    stop_ids: Collection[int] | None = None,
    *,
    stops: Sequence[str] = (),
    batch_size: int = MOST_ANSWERS,
    cache_bytes: int | None = None,
    tally: GenerationCounts | None = None,
    kv_format: KVFormat | None = None,
    sampling: Sampling | None = None,
    keys: Sequence[Sequence[int]] = (),
    log_probs: bool = False,
) -> list[Generation]:
    """Return the answer to each prompt, in order.

    Args:
        model: Any mlx-lm model; not changed. In evaluation mode, or its dropout takes part.
        tokenizer: Decodes the answers.
        prompts: Token ids, special tokens included, at least one each; a prompt may stand several
            times, to be answered as often.
        max_tokens: Longest answer, tokens: of all, or of each.
        stop_ids: Tokens that end an answer; None takes the tokenizer's own.
        stops: Strings that end an answer, also across tokens; the row leaves the batch
            at once.
        batch_size: Most answers generated in one batch.
        cache_bytes: Limit of keys, values and logits, without the weights; the batch is smaller
            where they would not fit, and at least 1. None takes what the
            device's memory budget leaves.
        tally: Counts the positions computed.
        kv_format: What keys and values are rounded to; None leaves them.
        sampling: How tokens are drawn; None takes the likeliest.
        keys: Of sampled answers, one each: what the draws follow from.
        log_probs: Whether sampled answers get ``Generation.log_probs``.

    Raises:
        SlimError: If a prompt is empty.
    """
    from mlx_lm.generate import BatchGenerator

    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise SlimError(f"prompt {index} has no tokens", "every prompt needs at least one")
    longest_answers = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    ends = set(tokenizer.eos_token_ids if stop_ids is None else stop_ids)
    until = _Until(tokenizer, stops)
    samplers = None
    if sampling is not None:
        samplers = [
            AnswerSampler(sampling, key, log_probs=log_probs)
            for _, key in zip(prompts, keys, strict=True)
        ]
    shared = _shared_prefix(prompts)
    counted = _Counted(model, exact=samplers is not None)
    repeated = 1 < len({tuple(prompt) for prompt in prompts}) < len(prompts)
    once = bool(shared) and not repeated and supports_shared_prefix(model)
    if prompts:
        if cache_bytes is None:
            cache_bytes = runtime.memory_budget("auto") - mx.get_active_memory()
        before = 0 if repeated else shared  # what each answer has a copy of counts as its own
        longest = max(len(p) + m for p, m in zip(prompts, longest_answers, strict=True)) - before
        batch_size = min(batch_size, footprint(model).answers(cache_bytes, longest, before, once))
    if batch_size > 1 and len(prompts) > 1 and not joins(model):
        batch_size = 1
    groups = _groups(counted, prompts, shared, once, kv_format)
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
    ended_by: dict[int, int] = {}
    row_of: dict[int, int] = {}
    with contextlib.ExitStack() as open_until_done:
        open_until_done.callback(generator.close)
        open_until_done.enter_context(host_exponentials())
        if not runtime.on_gpu():
            open_until_done.enter_context(blas.numpy_single_threaded())
        answering = open_until_done.enter_context(stage("answering", len(prompts), "questions"))
        while True:
            while len(ids) - len(reasons) < batch_size and (group := next(groups, None)):
                uids = generator.insert(
                    group.inputs,
                    max_tokens=[longest_answers[index] for index in group.rows],
                    caches=group.caches,
                    samplers=samplers and [samplers[index] for index in group.rows],
                )
                row_of.update(zip(uids, group.rows, strict=True))
                ids.update({index: [] for index in group.rows})
            if not (responses := _next(generator, model, once)):
                break
            runtime.return_free_memory()
            stopped: list[int] = []
            for response in responses:
                index = row_of[response.uid]
                if response.finish_reason == "stop":
                    reasons[index], ended_by[index] = "eos", response.token
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
            growing = sum(len(ids[i]) / (longest_answers[i] + 1) for i in ids if i not in reasons)
            answering.reach(len(reasons) + growing)
    if tally is not None:
        tally.computed += counted.positions
        sampled = sum(len(ids[i]) + (reasons[i] == "eos") - 1 for i in ids)
        tally.minimum += sampled + fewest_tokens([Request((*p, 0), len(p)) for p in prompts])

    def answer(index: int) -> Generation:
        count = len(ids[index]) + (index in ended_by)
        log_p = [one.item() for one in samplers[index].log_probs[:count]] if samplers else []
        return Generation(
            until.cut(ids[index]),
            ids[index],
            reasons[index],
            ended_by.get(index),
            cast(list[float], log_p) if log_probs else None,
        )

    return [answer(index) for index in range(len(prompts))]


@dataclass(frozen=True)
class _PromptGroup:
    """Prompts that enter the batch at one time: their rows, inputs and caches."""

    rows: list[int]
    inputs: list[list[int]]
    caches: list[list[Any]] | None


def _groups(
    model: _Counted,
    prompts: Sequence[Sequence[int]],
    shared: int,
    once: bool,
    kv_format: KVFormat | None,
) -> Iterator[_PromptGroup]:
    """Yield all prompts as one group; or, where some are repeated, the rows of each prompt.

    The cache of a repeated prompt is computed when its group is taken.
    """
    # Longest first: memory peaks at once, and prompts of one batch are of similar length.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for index in order:
        rows_of.setdefault(tuple(prompts[index]), []).append(index)
    if len(rows_of) in (1, len(prompts)):
        caches: list[list[Any]] | None = None
        if shared:
            begun = _prefill(model, list(prompts[0][:shared]), once, kv_format)
            caches = [begun] * len(prompts)
        elif kv_format is not None:
            caches = [rounded_caches(cast(nn.Module, model), kv_format) for _ in prompts]
        if prompts:
            yield _PromptGroup(order, [list(prompts[index][shared:]) for index in order], caches)
        return
    begun = _prefill(model, list(prompts[0][:shared]), False, kv_format)
    for prompt, rows in rows_of.items():
        cache = _prefill(model, list(prompt[shared:-1]), False, kv_format, begun)
        yield _PromptGroup(rows, [[prompt[-1]] for _ in rows], [cache] * len(rows))


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


def _prefill(
    model: Any,
    ids: list[int],
    once: bool,
    kv_format: KVFormat | None,
    begun: Sequence[Prefix] | None = None,
) -> list[Prefix]:
    """Return the prompt cache after ``ids`` (behind what ``begun`` has), shared or copied."""
    from mlx_lm.models.cache import make_prompt_cache

    if begun is not None:
        cache = [copy.deepcopy(prefix.cache) for prefix in begun]
    else:
        cache = make_prompt_cache(model) if kv_format is None else rounded_caches(model, kv_format)
    for begin in range(0, len(ids), PREFILL_TOKENS):
        model(mx.array([ids[begin : begin + PREFILL_TOKENS]]), cache=cache)
        mx.eval([layer.state for layer in cache])
    return [Prefix(layer, once) for layer in cache]

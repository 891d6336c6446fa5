"""A model to chat with: loads it with its adapter and streams its answers.

Invariant: nothing is computed twice. A turn reuses the longest prefix of the cached tokens that the
new prompt begins with, however the chat template renders earlier turns.
Try it: ``mlx-slim generate HuggingFaceTB/SmolLM2-135M-Instruct --prompt "Name three fruits."``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from jinja2 import TemplateError

from mlx_slim import runtime
from mlx_slim.adapters.inject import remove_adapters
from mlx_slim.adapters.stack import Adapters, Weighted, load_adapters, parse_adapters, used_folders
from mlx_slim.config.parallel import PARALLEL, Parallel
from mlx_slim.data.chat_render import apply_chat_template
from mlx_slim.data.tokenize import check_ids, check_text, unwrap
from mlx_slim.errors import RowLimit, SlimError
from mlx_slim.evaluation.divided import announce, answering_split, load_divided, shared_memory
from mlx_slim.evaluation.draft import DraftCount, DraftFigures, open_draft, seconds_without_draft
from mlx_slim.evaluation.scoring.requests import max_length
from mlx_slim.models.kv_cache import QUANTIZED_PREFILL, quantize_cache
from mlx_slim.models.load import read_config
from mlx_slim.models.parallel import agreed_sampler, divided_by
from mlx_slim.models.quantized import densify, densify_pays
from mlx_slim.models.rope import boundary_of, set_length
from mlx_slim.models.row_limits import row_limit
from mlx_slim.quantization.base import QuantizedBase, load_base, recorded_base
from mlx_slim.reading import ChatMessage, library_errors

PREFILL = 2048  # tokens of a prompt in one pass, as mlx-lm takes them
LONGEST_PROMPT = 1 << 20  # characters: 250,000 tokens of English, whose attention takes minutes


@dataclass(frozen=True)
class Reply:
    """Figures of one answer.

    Attributes:
        prompt_tokens: Tokens of the whole prompt.
        cached_tokens: Those of them that an earlier turn computed.
        tokens: Tokens of the answer.
        tokens_per_second: Of the answer, without the time of the prompt.
        peak_memory_bytes: MLX peak, bytes.
        stop_reason: ``stop`` (end of text), ``length`` (``max_tokens``) or ``interrupted``.
        draft: What the draft was worth; None without one.
    """

    prompt_tokens: int
    cached_tokens: int
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    stop_reason: str
    draft: DraftFigures | None = None


def _ignore(_: str) -> None:
    """Ignore a note."""


@dataclass
class ChatSession:
    """A model and its cache; ``open_session`` makes one.

    Attributes:
        model: The model, with its adapter.
        tokenizer: mlx-lm's wrapper.
        notes: On what was loaded in place of the source.
        over: How the base was quantized for the adapters; None if it was not.
        dense: Whether the source is dense, so that other adapters may need another base.
        last: Figures of the last answer; None before the first.
        limit: The longest sequence that the model computes correctly.
        tell: Called once when it is exceeded.
        draft: Drafts tokens for the model; None drafts none.
        num_draft_tokens: At a time.
        prefill_tokens: Of a prompt in one pass.
        max_length: Tokens that the model reads by its config.
    """

    model: Any
    tokenizer: Any
    notes: list[str] = field(default_factory=list)
    over: QuantizedBase | None = None
    dense: bool = False
    last: Reply | None = None
    limit: RowLimit | None = None
    tell: Callable[[str], None] = _ignore
    draft: Any = None
    num_draft_tokens: int = 3
    prefill_tokens: int = PREFILL
    max_length: int | None = None
    _told_length: bool = False
    _plain_seconds: float | None = None  # of a token without the draft
    _cache: list[Any] | None = None  # the model's, then the draft's
    _cached_ids: list[int] = field(default_factory=list)

    def use(self, adapter: Adapters | None) -> None:
        """Replace the adapters; None removes them.

        Raises:
            SlimError: If they do not fit the model, which has none then; if it is divided.
        """
        if divided_by(self.model) is not None:
            raise SlimError(
                "adapters are merged into a model that is divided over ranks",
                "start again with another --adapter",
            )
        remove_adapters(self.model)
        self._cache, self._cached_ids = None, []
        if stack := parse_adapters(adapter):
            if self.dense and _over(stack) != self.over:
                raise SlimError(
                    f"{stack[0].folder} was trained on {_over(stack) or 'the unquantized model'}, "
                    f"but {self.over or 'the unquantized model'} is loaded",
                    "start a chat with that adapter: mlx-slim chat MODEL --adapter DIR",
                )
            load_adapters(self.model, stack)
        self.model.eval()

    def chat_ids(self, messages: list[ChatMessage], **names: Any) -> list[int]:
        """Return the prompt of a conversation in the model's template.

        Args:
            messages: The turns: ``role``, ``content`` and what else the template reads.
            **names: ``tools`` and what else the template reads.

        Raises:
            SlimError: If the model has no chat template, or it refuses these messages.
        """
        if not self.tokenizer.has_chat_template:
            raise SlimError(
                "this model has no chat template",
                "it is a base model: mlx-slim generate MODEL --prompt TEXT continues a text",
            )
        for message in messages:
            _check_prompt(message.get("content") or "", f"the {message['role']}'s message")
        try:
            text = apply_chat_template(self.tokenizer, messages, **names)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise SlimError(
                f"the chat template refuses roles {roles}: {' '.join(str(error).split())[:200]}",
                "mlx-slim generate MODEL --no-chat-template continues the prompt as it is",
            ) from error
        return self._encoded(text, special=False)

    def text_ids(self, text: str) -> list[int]:
        """Return the tokens of ``text`` as it is, with the special tokens of its beginning."""
        bos = self.tokenizer.bos_token
        special = bos is None or not text.startswith(bos)
        return self._encoded(text, special=special)

    def _encoded(self, text: str, *, special: bool) -> list[int]:
        _check_prompt(text, "the prompt")
        with library_errors("the prompt cannot be tokenized"):
            return list(unwrap(self.tokenizer).encode(text, add_special_tokens=special))

    def stream(self, ids: list[int], *, max_tokens: int, temperature: float) -> Iterator[str]:
        """Yield the answer to the prompt ``ids`` in pieces; ``last`` is set as it grows.

        Raises:
            SlimError: If the prompt is empty, or has a token outside the model's vocabulary.
        """
        with runtime.memory_limits():
            yield from self._stream(ids, max_tokens, temperature)

    def timed_without_draft(self) -> Reply | None:
        """Return ``last`` with the speed-up: a few tokens are decoded without the draft, once."""
        if self.draft is not None and self.last is not None and self.last.draft is not None:
            if self._plain_seconds is None:
                with runtime.memory_limits():
                    self._plain_seconds = seconds_without_draft(self.model, self._cached_ids[-32:])
            figures = replace(self.last.draft, plain_seconds=self._plain_seconds)
            self.last = replace(self.last, draft=figures)
        return self.last

    def _stream(self, ids: list[int], max_tokens: int, temperature: float) -> Iterator[str]:
        from mlx_lm.generate import stream_generate
        from mlx_lm.sample_utils import make_sampler

        if not ids:
            raise SlimError("the prompt is empty", "enter some text")
        check_ids(self.tokenizer, ids, "the prompt")
        words = {"ids": ids, "max_tokens": max_tokens, "temperature": temperature}
        announce(self.model, words)
        reused: int | None = None
        generated: list[int] = []
        figures = DraftFigures()
        try:
            while True:  # repeated where the sequence exceeds the length at which the RoPE changes
                tokens, room = ids + generated, max_tokens - len(generated)
                cached = self._keep_prefix(tokens)
                reused = cached if reused is None else reused
                part, response = self._part(len(tokens), room), None
                count = DraftCount(part, self.num_draft_tokens)
                for response in count.watch(
                    stream_generate(
                        self.model,
                        self.tokenizer,
                        mx.array(tokens[cached:]),
                        max_tokens=part,
                        sampler=agreed_sampler(make_sampler(temp=temperature), self.model),
                        prompt_cache=self._cache,
                        prefill_step_size=self.prefill_tokens,
                        draft_model=self.draft,
                        num_draft_tokens=self.num_draft_tokens,
                    )
                ):
                    generated.append(response.token)
                    self._check(len(ids) + len(generated))
                    self.last = Reply(
                        prompt_tokens=len(ids),
                        cached_tokens=reused,
                        tokens=len(generated),
                        tokens_per_second=response.generation_tps,
                        peak_memory_bytes=mx.get_peak_memory(),
                        stop_reason=response.finish_reason or "interrupted",
                        draft=None if self.draft is None else figures + count.figures,
                    )
                    yield response.text
                figures += count.figures
                if response is None or response.finish_reason != "length" or part == room:
                    break
        except KeyboardInterrupt:
            if self.draft is not None:  # it may have come between the model's step and the draft's
                self._cache = None
            raise
        finally:
            self._cached_ids = ids + generated

    def _part(self, length: int, room: int) -> int:
        """Return how many of ``room`` tokens can follow before everything is recomputed.

        A token is rotated by the length of the sequence that it is predicted from, as in
        transformers, which drops its cache there.
        """
        boundary = boundary_of(self.model)
        return room if boundary is None or length > boundary else min(room, boundary - length + 1)

    def _check(self, tokens: int) -> None:
        if self.limit is not None and tokens > self.limit.tokens:
            self.tell(f"{self.limit.why}: longer answers differ from those of transformers")
            self.limit = None  # once
        if self.max_length is not None and tokens > self.max_length and not self._told_length:
            length = f"{self.max_length:,} tokens"
            self.tell(f"the model reads {length} by its config: what follows is unreliable")
            self._told_length = True

    def _keep_prefix(self, ids: list[int]) -> int:
        """Cut the cache to a prefix of ``ids``, without the last token; return its length."""
        from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache

        if not set_length(self.model, len(ids)):
            self._cache = None
        if self._cache is not None and can_trim_prompt_cache(self._cache):
            lengths: list[Any] = [getattr(cache, "offset", None) for cache in self._cache]
            if all(isinstance(n, int) and n <= len(self._cached_ids) for n in lengths):
                same = _shared(self._cached_ids[: min(lengths)], ids[:-1])
                cuts = [length - same for length in lengths]
                if [c.trim(n) for c, n in zip(self._cache, cuts, strict=True)] == cuts:
                    return same
        self._cache = make_prompt_cache(self.model)
        if self.draft is not None:
            self._cache += make_prompt_cache(self.draft)
        return 0


def _check_prompt(text: str, what: str) -> None:
    if len(text) > LONGEST_PROMPT:
        raise SlimError(
            f"{what} has more than {LONGEST_PROMPT:,} characters", "enter a shorter text"
        )
    check_text(text, what)


def _over(stack: Sequence[Weighted]) -> QuantizedBase | None:
    """Return how the base of ``stack`` is quantized, without its place."""
    recorded = recorded_base(used_folders(stack))
    return None if recorded is None else replace(recorded[1], model="", revision=None, folder=None)


def _shared(one: list[int], other: list[int]) -> int:
    """Return how many elements both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def open_session(
    source: str | Path,
    adapter: Adapters | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tell: Callable[[str], None] = _ignore,
    kv_bits: int | None = None,
    draft_model: str | Path | None = None,
    num_draft_tokens: int = 3,
    others: Sequence[str] = (),
    parallel: Parallel = PARALLEL,
) -> ChatSession:
    """Load a model to chat with.

    On a CPU it computes in float32 and, memory allowing, on dequantized weights: a decoding step
    has one row, so dequantizing a weight in every step costs more than the step.

    Args:
        source: Folder or hub id.
        adapter: Adapter folder, ours or mlx-lm's; of several (``DIR`` or ``DIR=WEIGHT``) the sum.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Run Python files of the repository.
        tell: Called with notes for the user.
        kv_bits: Bits of the cache's keys and values, 8 or 4; None keeps the model's dtype.
        draft_model: Folder or hub id of a model that drafts tokens; None drafts none.
        num_draft_tokens: Tokens that it drafts at a time.
        others: Adapters that ``use`` will be given later: the base is theirs, too.
        parallel: How several ranks divide the model.

    Raises:
        SlimError: If the model, the adapter or the draft cannot be used, the cache cannot be
            quantized, or the ranks cannot divide the model.
    """
    dtype = None if runtime.on_gpu() else mx.float32
    stack = [*parse_adapters(adapter), *parse_adapters(others)]
    dense = "quantization" not in read_config(source, revision)
    split = answering_split(source, revision, parallel, kv_bits, draft_model, stack)
    if split is None:
        loaded = load_base(
            source,
            used_folders(stack),
            revision=revision,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        if densify_pays(loaded.model):
            densify(loaded.model)
    else:
        loaded, _ = load_divided(
            source,
            split,
            stack,
            memory=shared_memory(),
            revision=revision,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
    notes = loaded.notes
    over = _over(stack) if dense else None
    limit = row_limit(loaded.config, restarts=True)
    speaker = ChatSession(
        loaded.model,
        loaded.tokenizer,
        notes,
        over,
        dense,
        limit=limit,
        tell=tell,
        max_length=max_length(loaded.config, loaded.tokenizer),
    )
    if split is None:
        speaker.use(adapter)
    if kv_bits is not None:
        quantize_cache(loaded.model, kv_bits, str(source))
        speaker.prefill_tokens = QUANTIZED_PREFILL
    if draft_model is not None:
        speaker.num_draft_tokens = num_draft_tokens
        speaker.draft = open_draft(draft_model, loaded.model, loaded.tokenizer, str(source))
    return speaker

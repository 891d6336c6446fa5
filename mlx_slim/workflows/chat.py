"""A model that answers: load it with its adapter, and stream what it says.

Invariant: what was already computed is never computed again. A turn keeps the longest prefix of the
cached tokens that the new prompt shares, whatever the chat template did to the turns before.
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
from mlx_slim.data.chat_render import apply_chat_template
from mlx_slim.data.tokenize import check_ids, check_text, unwrap
from mlx_slim.errors import RowLimit, SlimError
from mlx_slim.models.limits import limit_of
from mlx_slim.models.load import read_config
from mlx_slim.models.quantized import densify, densify_pays
from mlx_slim.models.rope import boundary_of, set_length
from mlx_slim.quantization.base import QuantizedBase, load_base, recorded_base
from mlx_slim.reading import library_errors

LONGEST_PROMPT = 1 << 20  # characters: 250,000 tokens of English, whose attention takes minutes


@dataclass(frozen=True)
class Reply:
    """How an answer went.

    Attributes:
        prompt_tokens: Tokens of the whole prompt.
        cached_tokens: Those of them that an earlier turn had computed.
        tokens: Tokens of the answer.
        tokens_per_second: Of the answer, the prompt's time left out.
        peak_memory_bytes: MLX peak, bytes.
        stop_reason: ``stop`` (the model ended) or ``length`` (``max_tokens`` was reached).
    """

    prompt_tokens: int
    cached_tokens: int
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    stop_reason: str


def _nobody(_: str) -> None:
    """Hear nothing."""


@dataclass
class ChatSession:
    """A model and what it holds in its cache; ``open_session`` makes one.

    Attributes:
        model: The model, with its adapter.
        tokenizer: mlx-lm's wrapper.
        notes: What was read in place of what was given.
        over: How the base was quantized for the adapters; None if it is as it was given.
        dense: Whether what was given is dense, so that other adapters may want another base.
        last: How the last answer went; None before the first.
        limit: The longest sequence that the model computes right.
        tell: Hears once that it was passed.
    """

    model: Any
    tokenizer: Any
    notes: list[str] = field(default_factory=list)
    over: QuantizedBase | None = None
    dense: bool = False
    last: Reply | None = None
    limit: RowLimit | None = None
    tell: Callable[[str], None] = _nobody
    _cache: list[Any] | None = None
    _cached_ids: list[int] = field(default_factory=list)

    def use(self, adapter: Adapters | None) -> None:
        """Answer with these adapters instead of those before; None is the model alone.

        Raises:
            SlimError: If they do not fit the model; it answers alone then.
        """
        remove_adapters(self.model)
        self._cache, self._cached_ids = None, []
        if stack := parse_adapters(adapter):
            if self.dense and _over(stack) != self.over:
                raise SlimError(
                    f"{stack[0].folder} was trained over {_over(stack) or 'the dense model'}, "
                    f"loaded is {self.over or 'the dense model'}",
                    "start again with that adapter: mlx-slim chat MODEL --adapter DIR",
                )
            load_adapters(self.model, stack)
        self.model.eval()

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the prompt of a conversation (``role``, ``content``) in the model's template.

        Raises:
            SlimError: If the model has no chat template, or it refuses these messages.
        """
        if not self.tokenizer.has_chat_template:
            raise SlimError(
                "this model has no chat template",
                "it is a base model: mlx-slim generate MODEL --prompt TEXT continues a text",
            )
        for message in messages:
            _check_prompt(message["content"], f"the {message['role']}'s message")
        try:
            text = apply_chat_template(self.tokenizer, messages)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise SlimError(
                f"the chat template refuses roles {roles}: {' '.join(str(error).split())[:200]}",
                "mlx-slim generate MODEL --no-chat-template continues the prompt as it stands",
            ) from error
        return self._encoded(text, special=False)

    def text_ids(self, text: str) -> list[int]:
        """Return the tokens of ``text`` as it stands, special tokens at its start included."""
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
            SlimError: If the prompt is empty, or holds a token that the model does not know.
        """
        from mlx_lm.generate import stream_generate
        from mlx_lm.sample_utils import make_sampler

        if not ids:
            raise SlimError("the prompt is empty", "give it some text")
        check_ids(self.tokenizer, ids, "the prompt")
        reused: int | None = None
        said: list[int] = []
        try:
            while True:  # again where the sequence passes the length at which the RoPE changes
                known, room = ids + said, max_tokens - len(said)
                cached = self._keep_prefix(known)
                reused = cached if reused is None else reused
                part, response = self._part(len(known), room), None
                for response in stream_generate(
                    self.model,
                    self.tokenizer,
                    mx.array(known[cached:]),
                    max_tokens=part,
                    sampler=make_sampler(temp=temperature),
                    prompt_cache=self._cache,
                ):
                    said.append(response.token)
                    self._check(len(ids) + len(said))
                    self.last = Reply(
                        prompt_tokens=len(ids),
                        cached_tokens=reused,
                        tokens=len(said),
                        tokens_per_second=response.generation_tps,
                        peak_memory_bytes=mx.get_peak_memory(),
                        stop_reason=response.finish_reason or "interrupted",
                    )
                    yield response.text
                if response is None or response.finish_reason != "length" or part == room:
                    break
        finally:
            self._cached_ids = ids + said

    def _part(self, known: int, room: int) -> int:
        """Return how many of ``room`` tokens can follow before everything is computed anew.

        A token is rotated by the length of the sequence that it is predicted from: as
        transformers does, which drops its cache there.
        """
        boundary = boundary_of(self.model)
        return room if boundary is None or known > boundary else min(room, boundary - known + 1)

    def _check(self, tokens: int) -> None:
        if self.limit is not None and tokens > self.limit.tokens:
            self.tell(f"{self.limit.why}: answers differ from transformers' beyond")
            self.limit = None  # said once

    def _keep_prefix(self, ids: list[int]) -> int:
        """Cut the cache to what ``ids`` begins with; return its tokens (at least one is left)."""
        from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

        if not set_length(self.model, len(ids)):
            self._cache = None
        if self._cache is not None:
            held = getattr(self._cache[0], "offset", None)
            if isinstance(held, int) and can_trim_prompt_cache(self._cache):
                known = self._cached_ids[:held]
                same = _shared(known, ids[:-1])
                extra = held - same
                if held == len(known) and trim_prompt_cache(self._cache, extra) == extra:
                    return same
        self._cache = make_prompt_cache(self.model)
        return 0


def _check_prompt(text: str, what: str) -> None:
    if len(text) > LONGEST_PROMPT:
        raise SlimError(
            f"{what} has more than {LONGEST_PROMPT:,} characters", "give it a shorter text"
        )
    check_text(text, what)


def _over(stack: Sequence[Weighted]) -> QuantizedBase | None:
    """Return how the base of ``stack`` is quantized, wherever it lies."""
    found = recorded_base(used_folders(stack))
    return None if found is None else replace(found[1], model="", revision=None, folder=None)


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
    tell: Callable[[str], None] = _nobody,
) -> ChatSession:
    """Load a model to talk with.

    On a CPU it computes in float32 and, memory allowing, on dequantized weights: a decoding step
    has one row, so rebuilding a quantized weight in every step costs more than the step.

    Args:
        source: Folder or hub id.
        adapter: Adapter folder, ours or mlx-lm's; of several (``DIR`` or ``DIR=WEIGHT``) the sum.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Run Python files that the repository brings.
        tell: Hears what the user should know of an answer.

    Raises:
        SlimError: If the model or the adapter cannot be used.
    """
    on_cpu = not runtime.on_gpu()
    stack = parse_adapters(adapter)
    dense = "quantization" not in read_config(source, revision)
    loaded = load_base(
        source,
        used_folders(stack),
        revision=revision,
        dtype=mx.float32 if on_cpu else None,
        trust_remote_code=trust_remote_code,
    )
    if densify_pays(loaded.model):
        densify(loaded.model)
    notes = loaded.notes
    over = _over(stack) if dense else None
    limit = limit_of(loaded.config, restarts=True)
    speaker = ChatSession(
        loaded.model, loaded.tokenizer, notes, over, dense, limit=limit, tell=tell
    )
    speaker.use(adapter)
    return speaker

"""Teachers that write text: a model on this machine, or (``endpoint.py``) a server.

Invariant: a teacher is loaded when the first response is missing, alone, and freed by ``close``;
``settings`` is available before and holds everything that decides its responses, and no secret.
Decoding is greedy. Try it: ``mlx-slim distill tinyllm-openbookqa -o runs/try``.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import mlx.core as mx
from jinja2 import TemplateError

from mlx_slim.adapters.store import check_adapter
from mlx_slim.artifacts import hash_bytes
from mlx_slim.config.distill import TeacherConfig
from mlx_slim.data.chat_render import apply_chat_template
from mlx_slim.data.tokenize import unwrap
from mlx_slim.distillation.teachers import fingerprint, load_teacher, name_of
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.scoring.generate import generate_batch
from mlx_slim.evaluation.scoring.requests import RequestEncoder, max_length
from mlx_slim.models.load import load_tokenizer, read_config
from mlx_slim.models.row_limits import row_limit
from mlx_slim.reading import ChatMessage, JsonObject


class UnreadableRequest(SlimError):
    """A request that a teacher cannot read: number ``index`` of its prompts."""

    def __init__(self, index: int, error: SlimError) -> None:
        super().__init__(error.message, error.hint)
        self.index = index


class Teacher(Protocol):
    """A model that answers in text.

    Attributes:
        name: In the lines of ``answers.jsonl``.
        chunk: Requests that are sent in one batch.
        batch_dependent: Responses may depend on what else is in the batch (by rounding).
        truncated: Prompts that were cut on the left so far.
    """

    name: str
    chunk: int
    batch_dependent: bool
    truncated: int

    @property
    def settings(self) -> JsonObject:
        """What decides the answers, as JSON."""
        ...

    def answer(self, prompts: Sequence[list[ChatMessage]]) -> Iterator[tuple[str, str]]:
        """Yield (text, stop reason: ``eos``, ``until`` or ``length``) for each chat, in order.

        Raises:
            UnreadableRequest: The teacher cannot read one of the chats.
            SlimError: It does not answer.
        """
        ...

    def close(self) -> None:
        """Free memory and threads."""
        ...


class LocalTeacher:
    """A model of this machine, read through its own chat template where it has one.

    Args:
        config: The teacher, with its model.
        dtype: To compute in.
        max_tokens: Longest answer, tokens.
        until: Texts that end an answer.

    Raises:
        SlimError: If model or adapter are not there.
    """

    chunk = 16  # what a kill may lose
    batch_dependent = True

    def __init__(
        self, config: TeacherConfig, *, dtype: mx.Dtype, max_tokens: int, until: Sequence[str] = ()
    ) -> None:
        self.name, self.truncated = name_of(config), 0
        self._config, self._dtype = config, dtype
        self._max_tokens, self._until = max_tokens, list(until)
        if config.adapter is not None:
            check_adapter(config.adapter)
        model = config.model or ""
        self._tokenizer: Any = load_tokenizer(model, revision=config.revision)
        template = getattr(unwrap(self._tokenizer), "chat_template", None)
        self._chat = bool(template)
        self._model: Any = None
        model_config = read_config(model, config.revision)
        self._encoder = RequestEncoder(
            self._tokenizer,
            max_length(model_config, self._tokenizer),
            chat=self._chat,
            limit=row_limit(model_config),
        )
        self._settings = {
            **fingerprint(config, dtype),
            "template": hash_bytes(str(template).encode()),
            "max_tokens": max_tokens,
            "until": self._until,
        }

    @property
    def settings(self) -> JsonObject:
        """Hashes of weights, adapter and template; dtype, ``max_tokens``, ``until``."""
        return self._settings

    def answer(self, prompts: Sequence[list[ChatMessage]]) -> Iterator[tuple[str, str]]:
        """Yield the greedy answers, computed as one batch."""
        if self._model is None:
            self._model = load_teacher(self._config, self._dtype)
        cut = self._encoder.truncated
        ids = [self._read(index, chat) for index, chat in enumerate(prompts)]
        self.truncated += self._encoder.truncated - cut
        answers = generate_batch(
            self._model,
            self._tokenizer,
            ids,
            self._max_tokens,
            stops=self._until,
            batch_size=self.chunk,
        )
        for answer in answers:
            yield answer.text, answer.stop_reason

    def _read(self, index: int, chat: list[ChatMessage]) -> list[int]:
        try:
            return self._encoder.prompt(self.text(chat), self._max_tokens)
        except SlimError as error:
            raise UnreadableRequest(index, error) from error

    def text(self, chat: list[ChatMessage]) -> str:
        """Return the prompt that the model reads.

        Raises:
            SlimError: If its chat template refuses the chat (some know no system message).
        """
        if not self._chat:
            return "\n\n".join(message["content"] for message in chat)
        try:
            return apply_chat_template(unwrap(self._tokenizer), chat)
        except TemplateError as error:
            raise SlimError(
                f"the chat template of teacher {self.name} refuses a row: "
                f"{' '.join(str(error).split())[:200]}",
                "give it rows that its template accepts, or take another teacher",
            ) from error

    def close(self) -> None:
        """Free the model."""
        self._model = None
        gc.collect()
        mx.clear_cache()

"""Teachers that write text: a model on this machine, or (``endpoint.py``) a server.

Invariant: a teacher is loaded when the first answer is missing, alone, and let go of by ``close``;
``settings`` is known before and holds everything that decides its answers, and no secret. Answers
are greedy. Try it: ``mlx-slim distill tinyllm-openbookqa -o runs/try``.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from mlx_slim.adapters.store import check_adapter, load_adapter
from mlx_slim.artifacts import hash_bytes, hash_files
from mlx_slim.data.tokenize import unwrap
from mlx_slim.errors import SlimError
from mlx_slim.evaluate.generate import generate_batch
from mlx_slim.evaluate.requests import Encoder, max_length
from mlx_slim.models.load import load, load_tokenizer, read_config, resolve
from mlx_slim.models.quantized import densify, densify_pays
from mlx_slim.runtime import dtype_name

Message = dict[str, Any]
_FILES = ("model*.safetensors", "config.json", "tokenizer*", "*.jinja")


class Teacher(Protocol):
    """Whoever answers in text.

    Attributes:
        name: In the answers' lines.
        chunk: Questions asked together.
        together: Answers may depend on which questions are asked together (by rounding).
        truncated: Prompts that were cut on the left so far.
    """

    name: str
    chunk: int
    together: bool
    truncated: int

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the answers, as JSON."""
        ...

    def answer(self, prompts: Sequence[list[Message]]) -> Iterator[tuple[str, str]]:
        """Yield (text, stop reason: ``eos``, ``until`` or ``length``) for each chat, in order."""
        ...

    def close(self) -> None:
        """Let go of memory and threads."""
        ...


class LocalTeacher:
    """A model of this machine, read through its own chat template where it has one.

    Args:
        name: In the answers' lines.
        model: Hub id or folder.
        revision: Of a hub model.
        adapter: Adapter folder that it wears, or None.
        dtype: To compute in.
        max_tokens: Longest answer, tokens.
        until: Texts that end an answer.

    Raises:
        SlimError: If model or adapter are not there.
    """

    chunk = 16  # what a kill may lose
    together = True

    def __init__(
        self,
        name: str,
        model: str,
        *,
        revision: str | None = None,
        adapter: str | None = None,
        dtype: mx.Dtype,
        max_tokens: int,
        until: Sequence[str] = (),
    ) -> None:
        self.name, self.truncated = name, 0
        self._model, self._revision, self._dtype = model, revision, dtype
        self._adapter = None if adapter is None else Path(adapter)
        self._max_tokens, self._until = max_tokens, list(until)
        folder = resolve(model, revision)
        self._tokenizer: Any = load_tokenizer(folder)
        if self._adapter is not None:
            check_adapter(self._adapter)
        template = getattr(unwrap(self._tokenizer), "chat_template", None)
        self._chat = bool(template)
        self._loaded: Any = None
        self._encoder = Encoder(
            self._tokenizer,
            max_length(read_config(model, revision), self._tokenizer),
            chat=self._chat,
        )
        files = {path for pattern in _FILES for path in folder.glob(pattern)}
        worn = self._adapter.glob("adapter*") if self._adapter is not None else ()
        self._settings = {
            "model_sha256": hash_files(files),
            "adapter_sha256": hash_files(worn) if self._adapter is not None else None,
            "template": hash_bytes(str(template).encode()),
            "dtype": dtype_name(dtype),
            "max_tokens": max_tokens,
            "until": self._until,
        }

    @property
    def settings(self) -> dict[str, Any]:
        """Hashes of weights, adapter and template; dtype, ``max_tokens``, ``until``."""
        return self._settings

    def answer(self, prompts: Sequence[list[Message]]) -> Iterator[tuple[str, str]]:
        """Yield the greedy answers, computed as one batch."""
        if self._loaded is None:
            self._loaded = load(self._model, revision=self._revision, dtype=self._dtype)
            if densify_pays(self._loaded.model):
                densify(self._loaded.model)
            if self._adapter is not None:
                load_adapter(self._loaded.model, self._adapter)
            self._loaded.model.eval()
        cut = self._encoder.truncated
        ids = [self._encoder.prompt(self.text(chat), self._max_tokens) for chat in prompts]
        self.truncated += self._encoder.truncated - cut
        answers = generate_batch(
            self._loaded.model,
            self._tokenizer,
            ids,
            self._max_tokens,
            stops=self._until,
            batch_size=self.chunk,
        )
        for found in answers:
            yield found.text, found.stop_reason

    def text(self, chat: list[Message]) -> str:
        """Return the prompt that the model reads.

        Raises:
            SlimError: If its chat template refuses the chat (some know no system message).
        """
        if not self._chat:
            return "\n\n".join(message["content"] for message in chat)
        try:
            rendered = unwrap(self._tokenizer).apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template can raise anything
            raise SlimError(
                f"the chat template of teacher {self.name} refuses a row: "
                f"{' '.join(str(error).split())[:200]}",
                "give it rows that it can read, or another teacher",
            ) from error
        return str(rendered)

    def close(self) -> None:
        """Free the model."""
        self._loaded = None
        gc.collect()
        mx.clear_cache()

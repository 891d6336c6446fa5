"""mlx-lm's generation thread with this package's models: loading, adapters, limits.

Invariant: the weights are in memory once, and only in this thread; a request that mlx-lm cannot
finish ends by itself, not with the thread. Used by ``serving/run.py``.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from queue import Queue
from typing import Any

import mlx.core as mx
from mlx_lm import server
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.server import CompletionRequest, GenerationArguments, ModelProvider, ResponseGenerator

from mlx_slim import runtime
from mlx_slim.adapters.store import adapter_hash
from mlx_slim.agreement import gather
from mlx_slim.data.tokenize import check_ids
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.chat import ChatSession, open_session
from mlx_slim.evaluation.draft import DraftCount, DraftFigures, seconds_without_draft
from mlx_slim.evaluation.scoring.answer_cache import Footprint, footprint, joins
from mlx_slim.models.parallel import divided_by
from mlx_slim.models.rope import boundary_of, set_length
from mlx_slim.reading import one_line, shown
from mlx_slim.serving.mlx_lm_options import (
    MOST_ANSWERS,
    MOST_PROMPTS,
    PROMPT_CACHES,
    server_arguments,
)
from mlx_slim.serving.names import ServedNames
from mlx_slim.serving.options import ServeOptions
from mlx_slim.serving.prompt_cache import PromptCache
from mlx_slim.serving.ranks import END, LeaderEndedError, agreed_tokens
from mlx_slim.serving.stops import until_stop
from mlx_slim.units import human_bytes

_CONTEXT = 4096  # tokens of an answer and its prompt, in the plan of how many fit at a time
_GENERATE = "stream_generate"


class Refused(BaseException):
    """Why a request is not answered; passes mlx-lm's ``except Exception``, which says 404 to all.

    Args:
        status: Of HTTP.
        error: Its text is the answer.
    """

    def __init__(self, status: int, error: SlimError) -> None:
        super().__init__(str(error))
        self.status, self.error = status, error


class Provider(ModelProvider):
    """One model, its adapters and its draft; requests switch the adapters.

    Args:
        served: What requests may name.
        options: Of the command.
        tell: Called with notes for the user.

    Attributes:
        session: The model; None before it is loaded.
        vocabulary: Tokens that it has logits for.
        plain_seconds: Of a token without the draft; None without one.
    """

    def __init__(
        self, served: ServedNames, options: ServeOptions, tell: Callable[[str], None]
    ) -> None:
        self.served, self._options, self.tell = served, options, tell
        self.session: ChatSession | None = None
        self.vocabulary = 0
        self.plain_seconds: float | None = None
        self._room = 0  # bytes that requests may take
        self._limit: int | None = None  # tokens of a prompt and its answer
        self._footprints: list[Footprint] = []  # of the model and the draft
        super().__init__(server_arguments(options))

    def load_default(self) -> None:
        """Load the model, and put each adapter on it once.

        Raises:
            SlimError: If the model, an adapter or the draft cannot be used.
        """
        if self.session is not None:
            return
        options = self._options
        session = open_session(
            self.served.model,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            kv_bits=options.kv_bits,
            draft_model=options.draft_model,
            others=[str(one) for one in self.served.adapters.values()],
            parallel=options.parallel,
        )
        for note in session.notes:
            self.tell(note)
        for adapter in self.served.adapters.values():
            session.use(str(adapter))
        model = session.model
        if divided_by(model) is None:
            session.use(None)
        set_length(model, boundary_of(model))  # sequences of a batch have many lengths
        limits = [session.max_length, boundary_of(model)]
        limits += [session.limit.tokens] if session.limit else []
        self._limit = min((n for n in limits if n is not None), default=None)
        self._footprints = [footprint(each) for each in (model, session.draft) if each is not None]
        self.vocabulary = self._footprints[0].vocabulary
        left = max(0, runtime.memory_budget("auto") - mx.get_active_memory())
        if divided_by(model) is not None:  # requests are refused on all ranks or on none
            left = min(gather(left))
        self._room, self.cli_args.prompt_cache_bytes = left // 2, left // 4
        typical = min(_CONTEXT, self._limit or _CONTEXT)
        answers = self._footprints[0].answers(self._room, typical, 0, shared=False)
        self.cli_args.decode_concurrency = min(MOST_ANSWERS, answers)
        self.cli_args.prompt_concurrency = min(MOST_PROMPTS, answers)
        self.model, self.tokenizer, self.draft_model = model, session.tokenizer, session.draft
        mergeable = all(hasattr(cache, "merge") for cache in make_prompt_cache(model))
        self.is_batchable = session.draft is None and mergeable and joins(model)
        if session.draft is not None:
            self.plain_seconds = seconds_without_draft(model, session.text_ids("The"))
        self.session = session
        self.model_key = (self.served.model, None, None)

    def load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> tuple[Any, Any]:
        """Return model and tokenizer under one of the served names; adapters are switched.

        Raises:
            SlimError: If the adapter is not there any more.
        """
        name = self.served.resolve(model_path, adapter_path, draft_model_path)
        adapter, session = self.served.adapters.get(name), self._session
        # Its content is part of the key: an adapter that was trained on has other keys and values.
        key = (self.served.model, name, None if adapter is None else adapter_hash(adapter.folder))
        if adapter is None:
            key = (self.served.model, None, None)
        if key != self.model_key:
            self.model_key = None
            session.use(None if adapter is None else str(adapter))
            self.model_key = key
        return session.model, session.tokenizer

    @property
    def _session(self) -> ChatSession:
        if self.session is None:
            raise SlimError("the model is not loaded")
        return self.session

    def reset(self) -> None:
        """Forget the model."""
        super().reset()
        self.session = None

    def check(self, ids: list[int], arguments: GenerationArguments) -> None:
        """Refuse a prompt that cannot be answered; cut the longest answer to what fits.

        Raises:
            SlimError: If it is empty, too long for the model or for the memory.
        """
        if not ids:
            raise SlimError("the prompt is empty")
        if divided_by(self.model) is not None and arguments.seed is not None:
            raise SlimError("a seed is not there for a model that is divided over ranks")
        check_ids(self.tokenizer, ids, "the prompt")
        for stop in arguments.stop_words:
            if not self.tokenizer.encode(stop, add_special_tokens=False):  # pyright: ignore
                raise SlimError(f"the stop {shown(stop)} has no tokens")
        room = arguments.max_tokens
        if self._limit is not None:
            room = min(room, self._limit - len(ids))
            if room < 1:
                raise SlimError(
                    f"the prompt has {len(ids):,} tokens; with an answer, this model reads "
                    f"{self._limit:,}"
                )
        needed = sum(each.least(len(ids) + room) for each in self._footprints)
        if needed > self._room:
            raise SlimError(
                f"a prompt of {len(ids):,} tokens and an answer of {room:,} take "
                f"{human_bytes(needed)}, this server has {human_bytes(self._room)}"
            )
        arguments.max_tokens = room


class Generator(ResponseGenerator):
    """Answers requests in a thread of its own, which loads the model first.

    Args:
        provider: Of the model.

    Attributes:
        figures: What the draft was worth so far.
    """

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.figures = DraftFigures(plain_seconds=provider.plain_seconds)
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._waiting: weakref.WeakSet[Queue[Any]] = weakref.WeakSet()
        super().__init__(provider, PromptCache(PROMPT_CACHES))

    def wait(self) -> None:
        """Wait until the model is loaded.

        Raises:
            SlimError: As ``Provider.load_default``.
        """
        while not self._ready.wait(0.1):
            pass
        if self._failure is not None:
            raise self._failure

    def _run_generate(self) -> None:
        try:
            try:
                self.provider.load_default()
                self.prompt_cache.max_bytes = self.provider.cli_args.prompt_cache_bytes
            except BaseException as error:
                self._failure = error
                return
            finally:
                self._ready.set()
            while not self._stop:
                try:
                    with agreed_tokens(self.provider.model):
                        self._generate()
                    self._share_object(END)
                except LeaderEndedError:
                    return
                except Exception as error:  # of a batch: its requests end, the server does not
                    self.provider.tell(f"a batch of answers failed: {one_line(error)}")
                    for queue in list(self._waiting):
                        queue.put(error)
        finally:
            mx.clear_streams()  # a thread that ends with a stream open aborts the process

    def _next_request(self, timeout: float | None = None) -> Any:
        request = super()._next_request(timeout)
        if request is not None and request[1:] == END:
            raise LeaderEndedError
        if request is not None:
            self._waiting.add(request[0])
        return request

    def _tokenize(
        self, tokenizer: Any, request: CompletionRequest, args: GenerationArguments
    ) -> tuple[Any, ...]:
        prepared = super()._tokenize(_Prompts(self.provider._session), request, args)
        self.provider.check(prepared[0], args)
        return prepared

    def _make_state_machine(self, model_key: Any, tokenizer: Any, stop_words: list[str]) -> Any:
        """Return what ends an answer by its tokens, and what reads its text: not for stops."""
        by_tokens, _ = super()._make_state_machine(model_key, tokenizer, stop_words)
        return by_tokens, super()._make_state_machine(model_key, tokenizer, [])[1]

    def generate(
        self, request: CompletionRequest, arguments: GenerationArguments, *others: Any, **words: Any
    ) -> Any:
        """Return the context of an answer, and its tokens as they come.

        Raises:
            Refused: If the request cannot be answered.
        """
        try:
            context, responses = super().generate(request, arguments, *others, **words)
        except SlimError as error:
            raise Refused(400, error) from error
        except Exception as error:
            text = f"the request cannot be answered: {one_line(error)}"
            raise Refused(500, SlimError(text)) from error
        tokenizer: Any = self.provider.tokenizer
        return context, until_stop(
            responses,
            arguments.stop_words,
            tokenizer.eos_token_ids,
            lambda token: tokenizer.decode([token]),
        )

    def _serve_single(self, request: Any, stream: mx.Stream) -> None:
        arguments: GenerationArguments = request[2]
        count = DraftCount(arguments.max_tokens, arguments.num_draft_tokens)
        with self._watched(count):
            super()._serve_single(request, stream)
        if self.provider.draft_model is not None and count.figures.proposed:
            plain = DraftFigures(plain_seconds=self.provider.plain_seconds)
            self.provider.tell(str(plain + count.figures))
            self.figures = self.figures + plain + count.figures

    @contextlib.contextmanager
    def _watched(self, count: DraftCount) -> Iterator[None]:
        """Inside, what mlx-lm's server generates is counted, and ends when the server does."""
        generate = getattr(server, _GENERATE)

        def watched(*arguments: Any, **words: Any) -> Iterator[Any]:
            for response in count.watch(generate(*arguments, **words)):
                yield response
                if self._stop:
                    break

        setattr(server, _GENERATE, watched)
        try:
            yield
        finally:
            setattr(server, _GENERATE, generate)


class _Prompts:
    """A tokenizer whose chat template is rendered within bounds."""

    def __init__(self, session: ChatSession) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session.tokenizer, name)

    @property
    def has_chat_template(self) -> bool:
        """Always: without one the request is refused where the template would be rendered."""
        return True

    def apply_chat_template(self, messages: Any, *, tokenize: bool, **names: Any) -> list[int]:
        """Return the prompt of a chat."""
        return self._session.chat_ids(messages, **names)

    def encode(self, text: str) -> list[int]:
        """Return the prompt of a text."""
        return self._session.text_ids(text)

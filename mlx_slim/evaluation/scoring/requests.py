r"""Token ids of contexts and continuations, exactly as the reference harness tokenizes them.

Invariant: ``ids`` is one tokenization of context + continuation, and its first
``start`` ids are as many as the context alone has; spaces that end a context belong to the
continuation; BOS occurs once: a tokenizer that adds it does not where the text begins with it, as a
rendered chat template may. Shared prefixes are encoded once (``encoding.py``). What does not fit is
cut on the left and counted. Try it: ``mlx-slim eval MODEL --task hellaswag --limit 100 -o out``.

    context "Question: …\nAnswer:"      continuation " Paris"
    ids     Q  :  …  Answer  :   | Paris          targets = ids[start:]
    inputs  Q  :  …  Answer  :                    ids[start - 1] predicts ids[start]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_slim.data.tokenize import check_ids, check_text, embedding_rows
from mlx_slim.errors import RowLimit, SlimError
from mlx_slim.evaluation.encoding import PrefixEncoder
from mlx_slim.reading import ModelConfig

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

DEFAULT_LENGTH = 2048  # positions, where neither config nor tokenizer names a longest input
_LENGTH_KEYS = ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len")


@dataclass(frozen=True)
class Request:
    """A continuation to score after its context.

    Attributes:
        ids: Token ids of context and continuation.
        start: Index of the first scored id, at least 1; ``ids[start:]`` are the targets.
    """

    ids: tuple[int, ...]
    start: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """The ids that the model must read: all but the last."""
        return self.ids[:-1]


def max_length(config: ModelConfig, tokenizer: TokenizerWrapper) -> int:
    """Return the most ids that the model may read at once.

    Args:
        config: The model's ``config.json``.
        tokenizer: Used where the config has no length.
    """
    text = config.get("text_config")
    for source in (config, text if isinstance(text, dict) else {}):
        for key in _LENGTH_KEYS:
            if isinstance(source.get(key), int) and source[key] > 0:
                return source[key]
    length = getattr(tokenizer, "model_max_length", None)
    return length if isinstance(length, int) and 0 < length < 10**9 else DEFAULT_LENGTH


def common_prefix(requests: Sequence[Request]) -> tuple[int, ...]:
    """Return the longest run of ids that begins the inputs of every request."""
    if not requests:
        return ()
    # Two suffice: tuples are compared lexicographically.
    first = min(request.inputs for request in requests)
    last = max(request.inputs for request in requests)
    return first[: shared_length(first, last)]


def shared_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Return how many leading items two sequences share."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length


class RequestEncoder:
    """Encodes requests and prompts for one model.

    Args:
        tokenizer: The model's tokenizer.
        max_length: Most ids that the model may read at once.
        chat: The texts are rendered by a training template, which includes all special tokens.
            Otherwise the tokenizer adds its own, as the harness does with templates too.
        limit: The longest input that the model computes correctly; what is longer, after cutting to
            ``max_length``, is refused.

    Attributes:
        truncated: Requests and prompts that were cut on the left so far.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        max_length: int,
        *,
        chat: bool = False,
        limit: RowLimit | None = None,
    ) -> None:
        self._tokenizer, self._chat = tokenizer, chat
        self._texts = PrefixEncoder(tokenizer)
        self.limit = limit if limit is not None and limit.tokens < max_length else None
        self._context: tuple[str, tuple[int, ...]] = ("", ())  # the last one, and its ids
        prefix = self._prefix()
        self._bos = "" if prefix is None else str(tokenizer.decode([prefix]))
        self.max_length = max_length
        self.truncated = 0
        # Some tokenizers append EOS to every text: it is not part of the text.
        probe = self._ids("a")
        bare = tokenizer.encode("a", add_special_tokens=False)
        self._closing = len(probe) - len(bare) if probe[: len(bare)] == bare else 0
        if not self._closing and probe[-1] != bare[-1]:
            self._closing = 1

    def request(self, context: str, continuation: str) -> Request:
        """Return the request of one choice.

        Raises:
            SlimError: If the continuation is empty, or longer than the model can read.
        """
        text = context.rstrip()
        continuation = context[len(text) :] + continuation
        if not text:
            prefix = self.prefix()
            bare = tuple(self._bare(continuation))
            ids = bare if bare[:1] == (prefix,) and len(bare) > 1 else (prefix, *bare)
            start = 1
        else:
            ids, before = self.encode(text + continuation), self._encoded(text)
            # The harness cuts by length, also where the last token of the context merged with the
            # first of the continuation. At least one id is left to score.
            start = min(len(before), len(ids) - 1) if ids != before else 0
        if start < 1 or len(ids) < 2:
            raise SlimError(
                f"the continuation {continuation!r} of {context[-40:]!r} has no tokens to score",
                "every choice needs some text",
            )
        excess = len(ids) - 1 - self.max_length
        if excess > 0:
            if start - excess < 1:
                raise SlimError(
                    f"a continuation has {len(ids) - start} tokens, "
                    f"the model reads {self.max_length} at most",
                    "shorten the choice, or take a model with a longer context",
                )
            ids, start = ids[excess:], start - excess
            self.truncated += 1
        self.check(len(ids) - 1, f"the input that ends with {text[-40:]!r}")
        return Request(ids, start)

    def prompt(self, context: str, reserve: int) -> list[int]:
        """Return the ids of a prompt, cut on the left to leave room for ``reserve`` new ids.

        Raises:
            SlimError: If the model has no room for that many.
        """
        room = self.max_length - reserve
        if room < 1:
            raise SlimError(
                f"{reserve} new tokens leave no room for a prompt in {self.max_length} positions",
                "ask for fewer new tokens",
            )
        ids = list(self.encode(context)) or [self.prefix()]
        if len(ids) > room:
            self.truncated += 1
        what = f"the prompt that ends with {context[-40:]!r}, and {reserve:,} new ones"
        self.check(min(len(ids), room) + reserve, what)
        return ids[-room:]

    def check(self, tokens: int, what: str) -> None:
        """Refuse an input of ``tokens`` ids if the model would compute it wrong.

        Raises:
            SlimError: Names the input.
        """
        if self.limit is not None:
            hint = (
                f"cut inputs to {self.limit.tokens:,} tokens (mlx-slim eval --max-length), counted"
            )
            self.limit.check(tokens, what, hint)

    def fits(self, text: str) -> bool:
        """Return whether the model can read ``text`` whatever its tokens are."""
        if embedding_rows(self._tokenizer) is not None:
            return False
        size = len(text.encode("utf-8", "surrogatepass"))
        return self.limit is None or 2 * size + 8 <= self.limit.tokens

    @property
    def checks(self) -> bool:
        """Whether there are texts that the model cannot read: too long, or with unknown tokens."""
        return self.limit is not None or embedding_rows(self._tokenizer) is not None

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of ``text``, with BOS where the tokenizer adds it, without EOS."""
        ids = self._ids(text)
        return tuple(ids[: len(ids) - self._closing])

    def document(self, text: str) -> tuple[int, ...]:
        """Return the ids of a whole document, with the special tokens that the tokenizer adds.

        A BOS that it adds is predicted too, as in the harness's rolling log-likelihood.
        """
        return tuple(self._ids(text))

    def _encoded(self, context: str) -> tuple[int, ...]:
        """Return the ids of a context, cached for the further choices of its question."""
        if context != self._context[0]:
            self._context = (context, self.encode(context))
        return self._context[1]

    def _ids(self, text: str) -> list[int]:
        special = not self._chat and not (self._bos and text.startswith(self._bos))
        return self._checked(text, lambda: self._texts.encode(text, special))

    def _bare(self, text: str) -> list[int]:
        return self._checked(
            text, lambda: self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        )

    def _checked(self, text: str, encode: Callable[[], Iterable[int]]) -> list[int]:
        """Return the ids of a text that the tokenizer can take and whose ids the model knows."""
        what = f"the text that ends with {text[-40:]!r}"
        check_text(text, what)
        ids = list(encode())
        check_ids(self._tokenizer, ids, what)
        return ids

    def _prefix(self) -> int | None:
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return None

    def prefix(self) -> int:
        """Return the id used for an empty context: BOS, else EOS."""
        if (token := self._prefix()) is not None:
            return token
        raise SlimError(
            "an empty context needs a BOS or EOS token, and the tokenizer has neither",
            "give every question some context",
        )

"""A teacher behind an endpoint that scores given texts: its K likeliest tokens at every position.

Invariant: what is stored is what a local teacher's cache holds: K token ids of the student's
vocabulary, their log-probabilities at T = 1, and the rest as one sum. Whether an endpoint can is
tried on two tokens before anything starts, and each reply is checked: as many positions as tokens,
these tokens, numbers that are log-probabilities. Texts go as token ids, so that no tokenizer of the
server's has a say. Two protocols of ``/v1/completions`` are known:

    prompt_logprobs: K     vLLM: for each token a map id -> log-probability
    echo, logprobs: K      OpenAI's, also vLLM's: for each token a map text -> log-probability;
                           ``return_tokens_as_token_ids`` asks for ``token_id:N`` in place of text

A text that stands for several ids, or for none, is counted with the rest; its place is taken by
ids that were not named, each with an even part of the rest, so that rows stay K wide. Try it:
``mlx-slim distill smollm2-lora distill.method=logits "distill.teachers=[{base_url:
http://127.0.0.1:8000/v1, model: NAME}]" -o runs/endpoint``, with ``vllm serve NAME
--max-logprobs 64``.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mlx_slim.config.distill import DistillConfig, TeacherConfig
from mlx_slim.config.schema import Recipe
from mlx_slim.data.batches import Batch
from mlx_slim.data.tokenize import unwrap
from mlx_slim.distillation.endpoint_client import EndpointClient, Unreachable
from mlx_slim.distillation.losses import FLOOR
from mlx_slim.distillation.target_cache import TargetLayout, TeacherTargets
from mlx_slim.distillation.target_generation import OpenTeacher
from mlx_slim.distillation.teachers import name_of
from mlx_slim.errors import SlimError
from mlx_slim.models.load import load_tokenizer, read_config
from mlx_slim.models.tokenizer import vocabulary_size
from mlx_slim.reading import JsonObject, parse_json

_LARGEST_REPLY = 1 << 28  # bytes: 4,096 tokens with 64 log-probabilities each are 20 MB
_ABOVE_ONE = 1e-3  # by which rounding may lift a sum of probabilities
_PROBE = "Hello world"
_TOKEN_ID = re.compile(r"token_id:(\d+)")
_PROTOCOLS: dict[str, Callable[[int], JsonObject]] = {
    "prompt_logprobs": lambda k: {"max_tokens": 1, "prompt_logprobs": k},
    "echo": lambda k: {
        "max_tokens": 0,
        "echo": True,
        "logprobs": k,
        "return_tokens_as_token_ids": True,
    },
}


class _Unusable(Exception):
    """A reply that gives no targets, and why."""


class _TokenScores(NamedTuple):
    """What a reply says about one token.

    Attributes:
        token: The token's key, None where the reply does not repeat it.
        logs: Key (an id, or a text) -> log-probability of the likeliest tokens in its place.
        texts: Id -> text, where the reply says both.
    """

    token: str | None
    logs: dict[Any, float]
    texts: dict[int, str]


class ScoringEndpoint:
    """A model that a server runs, which is sent requests for log-probabilities of given tokens.

    Args:
        config: The teacher, with ``base_url``.
        distill: The recipe's section.
        tokenizer: The student's, which the teacher must share.
        vocabulary: Tokens of the student's.

    Raises:
        SlimError: As ``EndpointClient``; a temperature other than 1.
    """

    def __init__(
        self, config: TeacherConfig, distill: DistillConfig, tokenizer: Any, vocabulary: int
    ) -> None:
        assert config.base_url is not None
        ask = distill.ask
        self.name = name_of(config)
        if distill.temperature != 1:
            raise SlimError(
                f"distill.temperature={distill.temperature:g}: the endpoint of teacher {self.name} "
                "says its probabilities at temperature 1 only",
                "set distill.temperature=1, or give the teacher's model folder",
            )
        self._model, self._vocabulary = config.model or "", vocabulary
        self._top_k = vocabulary if distill.top_k == "all" else min(distill.top_k, vocabulary)
        self._base_url = config.base_url.rstrip("/")
        self._tokenizer = unwrap(tokenizer)
        self._ids: dict[str, int | None] | None = None
        self._protocol = ""
        self._unreachable: SlimError | None = None
        self._client = EndpointClient(
            self.name,
            config.base_url,
            "completions",
            api_key_env=config.api_key_env,
            concurrency=ask.concurrency,
            timeout=ask.timeout,
            retries=ask.retries,
            saved="the targets so far are saved",
            largest=_LARGEST_REPLY,
        )

    @property
    def fingerprint(self) -> JsonObject:
        """What the targets depend on: address and model, as far as they can be known."""
        return {"base_url": self._base_url, "model": self._model}

    def check(self) -> None:
        """Try on two tokens whether the endpoint scores a given text; choose the protocol.

        One that does not answer at all is refused by ``require``: its targets may be on disk.

        Raises:
            SlimError: If it answers and does not score, with what it answered to each protocol.
        """
        probe = self._tokenizer.encode(_PROBE, add_special_tokens=False)
        ids_T = np.array((probe * 2)[:2], np.int64)
        refusals = []
        for protocol in _PROTOCOLS:
            self._protocol = protocol
            try:
                positions = self._positions(self._client.ask(self._payload(ids_T)), ids_T)
                self._check_texts(positions)
                (named_K,) = self._columns(positions)[0]
            except _Unusable as error:
                refusals.append(f"{protocol}: {error}")
            except Unreachable as error:
                self._unreachable = error
                return
            except SlimError as error:
                refusals.append(f"{protocol}: {error.message}")
            else:
                self._check_width(int((named_K >= 0).sum()), positions[1].logs)
                return
        raise SlimError(
            f"teacher {self.name}: {self._client.url} does not score a given text "
            f"({'; '.join(refusals)})",
            "serve it with vLLM, give its model folder, or train on its texts: "
            "distill.method=sequence",
        )

    def require(self, *, needed: bool) -> None:
        """Raise what ``check`` put off, if targets are missing.

        Raises:
            SlimError: The endpoint does not answer.
        """
        if needed and self._unreachable is not None:
            raise self._unreachable

    def _check_width(self, named: int, logs_by_key: dict[Any, float]) -> None:
        """Refuse an endpoint that gives fewer log-probabilities than are to be stored.

        Where it writes texts, those that stand for several tokens make fewer.
        """
        texts = any(self._number(key) is None for key in logs_by_key)
        if named >= (self._top_k / 4 if texts else self._top_k):
            return
        raise SlimError(
            f"teacher {self.name}: {self._client.url} gives {named} of {self._top_k} "
            "log-probabilities of a token",
            f"set distill.top_k={max(1, named)}, or let the server give more "
            f"(vLLM: --max-logprobs {self._top_k})",
        )

    def _check_texts(self, positions: Sequence[_TokenScores]) -> None:
        """Refuse a server whose tokens are others than the student's of the same ids."""
        for scores in positions:
            texts = {
                number: (theirs, self._tokenizer.decode([number]))
                for number, theirs in scores.texts.items()
                if number < len(self._tokenizer)
            }
            # Half characters are extra in several ways, and spaces in front may be cut.
            other = [
                f"{number} is {theirs!r} there and {ours!r} here"
                for number, (theirs, ours) in texts.items()
                if "\ufffd" not in theirs + ours and theirs.strip() != ours.strip()
            ]
            if 2 * len(other) > len(texts):
                raise _Unusable(f"another tokenizer: token {other[0]}")

    @contextlib.contextmanager
    def opened(self) -> Iterator[OpenTeacher]:
        """Inside, requests for targets are sent; the server needs no memory here."""
        try:
            yield lambda target_set: partial(self.targets, shape=target_set.shape)
        finally:
            self._client.close()

    def targets(self, batch: Batch, shape: TargetLayout) -> TeacherTargets:
        """Return the targets of a batch of rows side by side.

        Raises:
            SlimError: If a reply cannot be had, or gives no targets.
        """
        width = batch.tokens_BT.shape[1]
        row_N, column_N = np.divmod(batch.positions_N, width)
        rows, places = [], []
        for row in np.unique(row_N):
            here = np.flatnonzero(row_N == row)
            last = here[column_N[here].argmax()]
            ids = np.append(batch.tokens_BT[row, : column_N[last] + 1], batch.targets_N[last])
            rows.append(ids.astype(np.int64))
            places.append(here)
        ids_NK = np.zeros((len(row_N), shape.top_k), shape.id_type)
        top_NK = np.zeros((len(row_N), shape.top_k), np.float32)
        rest_N = np.zeros(len(row_N), np.float32)
        replies = self._client.map([self._payload(ids) for ids in rows], bytes)
        for ids, here, reply in zip(rows, places, replies, strict=True):
            try:
                named_TK, top_TK, rest_T = self._read(reply, ids)
            except _Unusable as error:
                raise SlimError(
                    f"teacher {self.name}: {self._client.url} gives no targets: {error}",
                    "the targets so far are saved; resume with a server that scores given texts",
                ) from error
            at = column_N[here]  # the reply's position 0 is token 1
            ids_NK[here], top_NK[here], rest_N[here] = filled(
                named_TK[at], top_TK[at], rest_T[at], shape.vocabulary
            )
        return ids_NK, top_NK, rest_N

    def _payload(self, ids_T: np.ndarray) -> JsonObject:
        return {
            "model": self._model,
            "prompt": ids_T.tolist(),
            "temperature": 1,
            "stream": False,
            **_PROTOCOLS[self._protocol](self._top_k),
        }

    def _read(self, reply: bytes, ids_T: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ids (−1 where fewer are named), log-probabilities and the rest's, (T − 1, K)."""
        return self._columns(self._positions(reply, ids_T))

    def _positions(self, reply: bytes, ids_T: np.ndarray) -> list[_TokenScores]:
        """Return what a reply says about each token that was sent."""
        try:
            choice = parse_json(reply, "the reply")["choices"][0]
            if self._protocol == "echo":
                positions = _echoed(choice["logprobs"])
            else:
                positions = _prompt_logprobs(choice["prompt_logprobs"])
        except (SlimError, LookupError, TypeError, AttributeError, ValueError):
            text = self._client.safe(reply[:200].decode("utf-8", "replace"))
            raise _Unusable(f"no log-probabilities in the reply: {text or 'nothing'}") from None
        # An echo may go on with a token that the server wrote.
        extra = int(self._protocol == "echo" and len(positions) == len(ids_T) + 1)
        if len(positions) != len(ids_T) + extra:
            raise _Unusable(f"{len(positions)} positions for {len(ids_T)} tokens")
        for number, token in enumerate(ids_T.tolist()):
            self._check_token(positions[number], token, number)
        return positions[: len(ids_T)]

    def _columns(
        self, positions: Sequence[_TokenScores]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        count = len(positions) - 1
        ids_TK = np.full((count, self._top_k), -1, np.int64)
        top_TK = np.full((count, self._top_k), -np.inf)
        rest_T = np.zeros(count)
        for number, scores in enumerate(positions[1:]):
            named, logs, rest_T[number] = self._named(scores.logs, number + 1)
            ids_TK[number, : len(named)] = named
            top_TK[number, : len(logs)] = logs
        return ids_TK, top_TK, rest_T

    def _check_token(self, scores: _TokenScores, token: int, number: int) -> None:
        """Refuse a reply about other tokens than those that were sent."""
        text = self._tokenizer.decode([token])
        if scores.token is None:  # vLLM names the token among the others
            if number and token not in scores.logs:
                raise _Unusable(f"no log-probability of token {number}, {token} ({text!r})")
            return
        number_of = self._id(scores.token)
        if number_of != token and (number_of is not None or scores.token != text):
            raise _Unusable(f"token {number} is {scores.token!r}, {token} ({text!r}) was sent")

    def _named(
        self, logs_by_key: dict[Any, float], number: int
    ) -> tuple[list[int], list[float], float]:
        """Return the ids that are named, their log-probabilities, and the rest's."""
        logs = np.array(list(logs_by_key.values()), np.float64)
        if not len(logs):
            raise _Unusable(f"no log-probabilities of token {number}")
        if np.isnan(logs).any() or (logs > _ABOVE_ONE).any():
            raise _Unusable(f"a log-probability of {logs.max():g} at token {number}")
        order = np.argsort(-logs, kind="stable")
        keys = list(logs_by_key)
        chosen = [(self._id(keys[i]), float(logs[i])) for i in order[: self._top_k]]
        named = {one: log for one, log in chosen if one is not None and 0 <= one < self._vocabulary}
        total = math.fsum(math.exp(log) for log in named.values())
        if total > 1 + _ABOVE_ONE:
            raise _Unusable(f"probabilities that add up to {total:g} at token {number}")
        rest = math.log(1 - total) if total < 1 else FLOOR
        return list(named), list(named.values()), max(rest, FLOOR)

    @staticmethod
    def _number(key: Any) -> int | None:
        """Return the id that a key is, None for a text."""
        if isinstance(key, int):
            return key
        match = _TOKEN_ID.fullmatch(key)
        return int(match[1]) if match else None

    def _id(self, key: Any) -> int | None:
        """Return the student's id of a key, None where it has none or several."""
        if (number := self._number(key)) is not None:
            return number
        if self._ids is None:
            self._ids = {}
            for number in range(len(self._tokenizer)):
                text = self._tokenizer.decode([number])
                self._ids[text] = None if text in self._ids else number
        return self._ids.get(key)


def scoring_endpoints(
    recipe: Recipe, distill: DistillConfig, teachers: Sequence[TeacherConfig]
) -> list[ScoringEndpoint | None]:
    """Return the endpoint of each teacher, tried, None for a model of this machine.

    Raises:
        SlimError: As ``ScoringEndpoint`` and its ``check``.
    """
    endpoints: list[ScoringEndpoint | None] = [None] * len(teachers)
    for number, teacher in enumerate(teachers):
        if teacher.base_url is not None:
            tokenizer = load_tokenizer(recipe.model, revision=recipe.revision)
            vocabulary = vocabulary_size(read_config(recipe.model, recipe.revision))
            endpoint = ScoringEndpoint(teacher, distill, tokenizer, vocabulary)
            endpoint.check()
            endpoints[number] = endpoint
    return endpoints


def filled(
    ids_NK: np.ndarray, top_NK: np.ndarray, rest_N: np.ndarray, vocabulary: int
) -> TeacherTargets:
    """Return targets whose places without an id hold other ids, each with an even part of the rest.

    Args:
        ids_NK: Token ids, −1 behind the last one that is named.
        top_NK: Their log-probabilities.
        rest_N: That of all others.
        vocabulary: Tokens of the student's.
    """
    ids_NK, top_NK, rest_N = ids_NK.copy(), top_NK.copy(), rest_N.copy()
    width = ids_NK.shape[1]
    for row in np.flatnonzero((ids_NK < 0).any(axis=1)):
        named = ids_NK[row][ids_NK[row] >= 0]
        unnamed = vocabulary - len(named)
        count = width - len(named)
        others = np.setdiff1d(np.arange(min(vocabulary, 2 * width)), named)[:count]
        ids_NK[row, len(named) :] = others
        top_NK[row, len(named) :] = rest_N[row] - math.log(unnamed)
        left = (unnamed - count) / unnamed
        rest_N[row] = rest_N[row] + math.log(left) if left > 0 else FLOOR
    top_NK = np.maximum(top_NK, FLOOR).astype(np.float32)
    return ids_NK, top_NK, np.maximum(rest_N, FLOOR).astype(np.float32)


def _prompt_logprobs(entries: list[dict[str, JsonObject] | None]) -> list[_TokenScores]:
    """Read vLLM's ``prompt_logprobs``: one map a token, none for the first."""
    positions = []
    for entry in entries:
        tokens = {int(key): value for key, value in (entry or {}).items()}
        logs_by_key = {number: float(value["logprob"]) for number, value in tokens.items()}
        texts = {n: str(v["decoded_token"]) for n, v in tokens.items() if v.get("decoded_token")}
        positions.append(_TokenScores(None, logs_by_key, texts))
    return positions


def _echoed(logprobs: JsonObject) -> list[_TokenScores]:
    """Read ``logprobs`` of an echoed prompt: one text and one map a token."""
    tops = [{str(k): float(v) for k, v in (top or {}).items()} for top in logprobs["top_logprobs"]]
    tokens = [str(token) for token in logprobs["tokens"]]
    return [_TokenScores(token, top, {}) for token, top in zip(tokens, tops, strict=True)]

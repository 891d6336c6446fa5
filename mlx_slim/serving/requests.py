"""The body of a request: read within bounds, every value checked, before mlx-lm sees it.

Invariant: what passes has the types and ranges that mlx-lm's server and its samplers expect, for
some of them fail in the thread that generates, and names only what is served. What would change the
answer and is not supported is refused, not ignored; other keys are dropped. Used by
``serving/handler.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from mlx_slim.config.values import MOST
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.chat import LONGEST_PROMPT
from mlx_slim.reading import JsonObject, field, parse_json, shown
from mlx_slim.serving.names import DEFAULT, NotServed, ServedNames

CHAT = ("/v1/chat/completions", "/chat/completions")
TEXT = "/v1/completions"
MAX_BODY = 8 << 20  # bytes: LONGEST_PROMPT characters, escaped
_WHERE = "the request"
_MOST_NAME = 1024
_MOST_ITEMS = 4096  # messages, tools, entries of a map
_MOST_STOPS = 16
_MOST_BIAS = 100  # as OpenAI's; a logit of infinity leaves no probabilities
# What a template may not be given anew: its own arguments, and those of the renderer.
_RESERVED = frozenset(
    {"messages", "conversation", "tools", "tokenize", "chat_template", "add_generation_prompt"}
    | {"source", "strict", "documents", "return_dict", "self", "tokenizer"}
)
_FLOATS = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 0.5),
}
_INTEGERS = {
    "max_tokens": (1, MOST),
    "max_completion_tokens": (1, MOST),
    "num_draft_tokens": (1, 16),
    "repetition_context_size": (1, MOST),
    "presence_context_size": (1, MOST),
    "frequency_context_size": (1, MOST),
    "top_logprobs": (0, 11),
    "seed": (0, 2**63 - 1),
}
# key -> the only values that change nothing
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "role_mapping": (),
    "modalities": (["text"],),
}


def read_request(data: bytes, path: str, served: ServedNames, vocabulary: int) -> JsonObject:
    """Return the body of a completion request as mlx-lm's server takes it.

    Args:
        data: JSON.
        path: ``TEXT`` or one of ``CHAT``.
        served: What may be named; ``model`` of the result is one of its names.
        vocabulary: Tokens that the model has logits for.

    Raises:
        NotServed: If a model, adapter or draft is named that is not served.
        SlimError: Names the value that cannot be used.
    """
    try:
        return _checked(data, path, served, vocabulary)
    except NotServed:
        raise
    except SlimError as error:  # what its hint says to do is about files
        raise SlimError(error.message) from error


def _checked(data: bytes, path: str, served: ServedNames, vocabulary: int) -> JsonObject:
    body = parse_json(data, _WHERE)
    if type(body) is not dict:
        raise SlimError(f"{_WHERE} is {shown(body)}, expected a JSON object")
    clean: JsonObject = {}
    names = {
        key: field(body, _WHERE, key, str, default, high=_MOST_NAME)
        for key, default in (("model", DEFAULT), ("adapters", None), ("draft_model", None))
    }
    clean["model"] = served.resolve(names["model"], names["adapters"], names["draft_model"])
    for key, allowed in _ONLY.items():
        if (value := body.get(key)) is not None and value not in allowed:
            raise SlimError(f"{_WHERE}: {key} = {shown(value)} is not supported")
    for key, (low, high) in _FLOATS.items():
        _take(clean, body, key, float, low=low, high=high, change=float)
    for key, (low, high) in _INTEGERS.items():
        _take(clean, body, key, int, low=low, high=high)
    _take(clean, body, "top_k", int, low=0, high=vocabulary - 1)
    _take(clean, body, "stream", bool)
    _take(clean, body, "logprobs", bool)
    if clean.get("top_logprobs"):
        clean["logprobs"] = True
    if clean.get("logprobs") and clean.get("stream"):
        raise SlimError(f"{_WHERE}: logprobs of a stream are not supported: send stream = false")
    options = field(body, _WHERE, "stream_options", dict, None)
    if options is not None:
        usage = field(options, f"{_WHERE}: stream_options", "include_usage", bool, False)
        clean["stream_options"] = {"include_usage": usage}
    _take(clean, body, "logit_bias", dict, of=float, high=_MOST_ITEMS)
    for token in clean.get("logit_bias", ()):
        if not (re.fullmatch("[0-9]{1,9}", token) and int(token) < vocabulary):
            raise SlimError(
                f"{_WHERE}: logit_bias names the token {shown(token)}, expected a number below "
                f"{vocabulary:,}"
            )
        if abs(bias := clean["logit_bias"][token]) > _MOST_BIAS:
            raise SlimError(
                f"{_WHERE}: logit_bias[{shown(token)}] is {bias:g}, expected a number from "
                f"-{_MOST_BIAS} to {_MOST_BIAS}"
            )
    if stops := _stops(body):
        clean["stop"] = stops
    if path == TEXT:
        clean["prompt"] = field(body, _WHERE, "prompt", str, low=1, high=LONGEST_PROMPT)
        return clean
    clean["messages"] = _messages(body)
    if body.get("tool_choice") != "none":
        _take(clean, body, "tools", list, of=dict, high=_MOST_ITEMS)
    _take(clean, body, "chat_template_kwargs", dict, high=64)
    for key in clean.get("chat_template_kwargs", ()):
        if key in _RESERVED or not key.isidentifier():
            raise SlimError(f"{_WHERE}: chat_template_kwargs may not hold {shown(key)}")
    return clean


def _take(
    clean: JsonObject,
    body: JsonObject,
    key: str,
    kind: type,
    *,
    change: Callable[[Any], Any] | None = None,
    **bounds: Any,
) -> None:
    """Copy a value that is there and not null."""
    if (value := field(body, _WHERE, key, kind, None, **bounds)) is not None:
        clean[key] = value if change is None else change(value)


def _stops(body: JsonObject) -> list[str]:
    value = body.get("stop")
    values = [value] if isinstance(value, str) else value
    stops = field({"stop": values}, _WHERE, "stop", list, [], of=str, high=_MOST_STOPS)
    for stop in stops:
        if not 1 <= len(stop) <= _MOST_NAME:
            raise SlimError(
                f"{_WHERE}: a stop of {len(stop):,} characters, expected 1 to {_MOST_NAME:,}"
            )
    return stops


def _messages(body: JsonObject) -> list[JsonObject]:
    """Return the turns, with their content as one text each."""
    messages = field(body, _WHERE, "messages", list, of=dict, low=1, high=_MOST_ITEMS)
    return [_message(each, f"{_WHERE}: messages[{i}]") for i, each in enumerate(messages)]


def _message(message: JsonObject, where: str) -> JsonObject:
    clean = {**message, "role": field(message, where, "role", str, low=1, high=64)}
    content = message.get("content")
    if isinstance(content, list):
        pieces = field(message, where, "content", list, of=dict, high=_MOST_ITEMS)
        for piece in pieces:
            if piece.get("type") != "text":
                raise SlimError(
                    f"{where}: content of type {shown(piece.get('type'))}, expected text"
                )
            field(piece, where, "text", str)
        content = "".join(piece["text"] for piece in pieces)
    clean["content"] = field({"content": content}, where, "content", str, "", high=LONGEST_PROMPT)
    for call in field(message, where, "tool_calls", list, [], of=dict, high=_MOST_ITEMS):
        function = field(call, f"{where}: tool_calls", "function", dict)
        field(function, f"{where}: tool_calls", "name", str)
        arguments = function.get("arguments")
        if isinstance(arguments, str):  # as OpenAI's clients send them back
            arguments = parse_json(arguments or "{}", f"{where}: arguments of a tool call")
        field({"arguments": arguments}, f"{where}: tool_calls", "arguments", dict, None)
    if clean.get("tool_calls") is None:
        clean.pop("tool_calls", None)
    return clean


def as_error(error: SlimError, status: int) -> bytes:
    """Return the body of a refusal, as OpenAI's clients read it."""
    record = {
        "message": str(error),
        "type": "invalid_request_error" if status < 500 else "server_error",
        "code": "model_not_found" if isinstance(error, NotServed) else None,
    }
    return json.dumps({"error": record}).encode()

"""Conversations in the dialects that exports use, as OpenAI's ``messages``: one normal form.

Invariant: a turn has ``role`` and ``content`` (a string), tool calls have a name and arguments that
are an object, tools are a list of schemas; what cannot be read so is one line that names row and
turn. Read are OpenAI's form, its older ``functions`` and ``function_call``, ShareGPT's roles, and
TRL's lists in ``prompt`` and ``completion``. Nulls that columns pad objects with are removed: a
table gives every row the keys of all rows. Try it: ``mlx-slim data preview smollm2-lora``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_slim.data.sources import RawRow
from mlx_slim.errors import SlimError
from mlx_slim.reading import ChatMessage, JsonObject, shown

_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "ipython")},
    **{"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"},
    **{"model": "assistant", "function": "tool", "observation": "tool"},
    **{"function_response": "tool", "tool_response": "tool"},
    **{"function_call": "assistant", "tool_call": "assistant"},
}
_CALLS = ("function_call", "tool_call")  # roles whose text is a call
# Names for learning a turn or not: OpenAI's exports', axolotl's, ms-swift's; torchtune's says not.
_FLAGS = ("train", "training", "train_on_turn", "trainable", "loss", "masked")
_READ_KEYS = {"from", "value", "role", "content", "function_call", "weight", *_FLAGS}
_TEXT_FILES = re.compile(r"\.(json|jsonl|ndjson)(\.\w+)?$")  # whose nulls were written by someone
_NULLABLE = frozenset({"default", "const", "example"})  # of a schema: null is a value there
_MOST_WEIGHT = 1e6


@dataclass(frozen=True)
class Conversation:
    """A row's turns.

    Attributes:
        messages: ``role``, ``content`` and what else the template may know.
        weights: Loss weight of each turn; 0 for turns that are not the assistant's.
        tools: Schemas of the tools that it may call.
        notes: What is not done as the row says, for the ledger.
    """

    messages: list[ChatMessage]
    weights: list[float]
    tools: list[JsonObject]
    notes: tuple[str, ...] = ()


def is_prompt_list(value: Mapping[str, Any]) -> bool:
    """Return whether a row is TRL's conversational form: lists in ``prompt`` or ``completion``."""
    return (
        any(
            isinstance(value.get(name), list) and all(isinstance(t, dict) for t in value[name])
            for name in ("prompt", "completion")
        )
        and {"prompt", "completion"} <= value.keys()
    )


def with_turns(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row whose ``prompt`` is a list of turns, where a table holds it as JSON text."""
    parsed = {name: turns_in_json(value.get(name)) for name in ("prompt", "completion")}
    return {**value, **{k: v for k, v in parsed.items() if v}} if parsed["prompt"] else value


def turns_in_json(text: Any) -> list[JsonObject] | None:
    """Return the turns that a text is in JSON; None if it is none."""
    if not isinstance(text, str) or not text.lstrip().startswith("["):
        return None
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError):
        return None
    pairs = ({"role", "content"}, {"from", "value"})
    are_turns = (isinstance(t, dict) and any(pair <= t.keys() for pair in pairs) for t in turns)
    return turns if turns and all(are_turns) else None


def read_conversation(row: RawRow, value: Mapping[str, Any]) -> Conversation:
    """Return the turns of a row with ``messages``, ``conversations``, or lists as a prompt.

    Args:
        row: Its place, and where it came from.
        value: Its columns that are not null.

    Raises:
        SlimError: Turns, calls, tools or weights that cannot be read.
    """
    context = 0  # turns that are not learned, whatever they are
    turns = value.get("messages", value.get("conversations"))
    if turns is None and is_prompt_list(value):
        prompt = _turn_list(value["prompt"], "user")
        context = len(prompt)
        turns = [*prompt, *_turn_list(value["completion"], "assistant")]
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = _parsed(row, turns, "the list of turns")
    if not isinstance(turns, list):
        raise SlimError(f"{row.place}: turns is {type(turns).__name__}, expected a list")
    padded = not _TEXT_FILES.search(row.where)
    tools = _tools(row, value.get("tools", value.get("functions")), padded)
    reader = _Reader(row, padded, _declared(tools))
    messages, weights, notes = [], [], []
    for index, turn in enumerate(turns, 1):
        messages.append(reader.message(index, turn))
        weight, marked = reader.weight(index, turn)
        answer = messages[-1]["role"] == "assistant"
        weights.append(weight if answer and index > context else 0.0)
        if marked and not answer:
            notes.append("turns marked to be learned that are no assistant's (not learned)")
    return Conversation(messages, weights, tools, tuple(dict.fromkeys(notes)))


def _turn_list(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


@dataclass(frozen=True)
class _Reader:
    """Reads the turns of one row.

    Attributes:
        row: For its place.
        padded: Nulls in objects are padding.
        declared: Names of the parameters of each tool.
    """

    row: RawRow
    padded: bool
    declared: dict[str, set[str]]

    def _wrong(self, index: int, text: str, hint: str = "") -> SlimError:
        return SlimError(f"{self.row.place}, turn {index}: {text}", hint)

    def message(self, index: int, turn: Any) -> ChatMessage:
        """Return one turn as ``{role, content, …}``, whichever of the dialects it is in."""
        if not isinstance(turn, dict):
            raise self._wrong(index, f"{type(turn).__name__}, expected an object")
        rest = {k: v for k, v in turn.items() if k not in _READ_KEYS and v is not None}
        name = turn.get("role", turn.get("from"))
        role = _ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            seen = f"role {name!r}" if name is not None else f"keys {', '.join(turn) or 'none'}"
            raise self._wrong(
                index,
                f"{seen}, expected {{role, content}} or {{from, value}}",
                "roles: system, user, assistant, tool (human, gpt, function_call and observation "
                "with from/value)",
            )
        content = turn.get("content", turn.get("value"))
        calls = rest.pop("tool_calls", None) or turn.get("function_call")
        if name in _CALLS and not calls:
            content, calls = None, self._json(index, content, "the call")
        if calls:
            rest["tool_calls"] = self._calls(index, calls)
        return {**rest, "role": role, "content": self._content(index, content, role)}

    def _content(self, index: int, content: Any, role: str) -> str:
        if isinstance(content, list):  # the parts of the OpenAI API
            pieces = [piece.get("text") if isinstance(piece, dict) else piece for piece in content]
            texts = [piece for piece in pieces if isinstance(piece, str)]
            if len(texts) < len(pieces) and role != "tool":
                kinds = {p.get("type") for p in content if isinstance(p, dict) and "text" not in p}
                raise self._wrong(
                    index,
                    f"content is not text alone: {', '.join(map(str, kinds)) or content}",
                    "only text is trained on: remove the rest, or the rows that need it",
                )
            content = "".join(texts) if len(texts) == len(pieces) else content
        if content is None:
            return ""
        if role == "tool" and isinstance(content, (dict, list)):
            return json.dumps(content, ensure_ascii=False)  # what a tool gave, as an object
        if not isinstance(content, str):
            raise self._wrong(index, f"content is {type(content).__name__}, expected a string")
        return content

    def _json(self, index: int, text: Any, what: str) -> Any:
        if not isinstance(text, str):
            return text
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._wrong(
                index, f"{what} is not JSON: {text[:40]!r}", "expected a name and its arguments"
            ) from error

    def _calls(self, index: int, value: Any) -> list[JsonObject]:
        """Return tool calls as ``{type, function: {name, arguments}}``."""
        value = self._json(index, value, "tool_calls")
        calls = []
        for call in value if isinstance(value, list) else [value]:
            call = self._json(index, call, "a tool call")
            call = (
                {k: v for k, v in call.items() if v is not None} if isinstance(call, dict) else {}
            )
            function = call.pop("function", None)
            if function is None and "name" in call:  # bare, as it was in ``function_call``
                function, call = call, {}
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise self._wrong(
                    index, f"a tool call is {str(value)[:40]!r}", "expected a name and arguments"
                )
            function = {k: v for k, v in function.items() if v is not None}
            parameters = function.pop("parameters", {})
            function["arguments"] = self._arguments(
                index, function["name"], function.get("arguments", parameters)
            )
            calls.append({"type": "function", **call, "function": function})
        return calls

    def _arguments(self, index: int, name: str, value: Any) -> JsonObject:
        text = isinstance(value, str)
        for _ in range(2):  # an export of an export is quoted twice
            value = self._json(index, value or "{}", f"arguments of {name!r}")
        if not isinstance(value, dict):
            raise self._wrong(
                index, f"arguments of {name!r} are {type(value).__name__}, expected an object"
            )
        if text:
            return value  # a null in it was written by someone
        if self.padded:
            return without_nulls(value)
        parameters = self.declared.get(name)
        return {
            k: v for k, v in value.items() if v is not None or parameters is None or k in parameters
        }

    def weight(self, index: int, turn: JsonObject) -> tuple[float, bool]:
        """Return the loss weight that a turn asks for, and whether it asks to be learned."""
        weight, marked = 1.0, False
        for name in _FLAGS:
            flag = turn.get(name)
            if flag is None or (name == "loss" and isinstance(flag, float)):
                continue  # a loss that somebody measured
            if flag not in (0, 1) or isinstance(flag, str):
                raise self._wrong(index, f"{name} is {flag!r}, expected true or false")
            if name == "masked":
                weight *= 1 - flag
                continue
            weight, marked = weight * flag, marked or bool(flag)
        if turn.get("mask") is not None:
            raise self._wrong(
                index,
                f"mask is {shown(turn['mask'])}, which has opposite meanings in other tools",
                "say train: true or train: false for each turn instead",
            )
        factor = turn.get("weight")
        if factor is not None:
            if not isinstance(factor, (int, float)) or not 0 <= factor <= _MOST_WEIGHT:
                raise self._wrong(
                    index, f"weight is {factor!r}, expected a number from 0 to {_MOST_WEIGHT:g}"
                )
            weight *= factor
        return float(weight), marked


def _parsed(row: RawRow, value: Any, what: str) -> Any:
    """Return what a string says in JSON; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise SlimError(
            f"{row.place}: {what}: {value[:40]!r}, expected JSON",
            "fix the row, or drop the column",
        ) from error


def _tools(row: RawRow, schemas: Any, padded: bool) -> list[JsonObject]:
    """Return tool schemas as OpenAI's list of ``{type, function}``."""
    hint = "expected a list of schemas {type: function, function: {name, parameters}}"

    whole = _parsed(row, schemas, "tools") if schemas else None
    whole = (_parsed(row, whole, "tools") if whole else None) or []  # it may be quoted twice
    tools = []
    for each in whole if isinstance(whole, list) else [whole]:
        tool = _parsed(row, each, "a tool")
        if not isinstance(tool, dict):
            raise SlimError(f"{row.place}: {str(tool)[:40]!r} is not a tool", hint)
        if not isinstance(schemas, str) and not isinstance(each, str):
            tool = without_nulls(tool, frozenset() if padded else _NULLABLE)
        if "function" not in tool and "name" in tool:
            bare = {k: v for k, v in tool.items() if (k, v) != ("type", "function")}
            tool = {"type": "function", "function": bare}
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise SlimError(f"{row.place}: {str(tool)[:40]!r} is not a tool", hint)
        tools.append(tool)
    return tools


def _declared(tools: list[JsonObject]) -> dict[str, set[str]]:
    """Return the names of the parameters of each tool."""
    declared = {}
    for tool in tools:
        function = tool.get("function")
        parameters = function.get("parameters") if isinstance(function, dict) else None
        if isinstance(function, dict) and isinstance(parameters, dict):
            properties = parameters.get("properties")
            names = set(properties) if isinstance(properties, dict) else set()
            declared[str(function.get("name"))] = names
    return declared


def with_text_arguments(messages: list[ChatMessage]) -> list[ChatMessage]:
    """Return a conversation with the arguments of tool calls as JSON text, as OpenAI sends them."""

    def dumped(call: JsonObject) -> JsonObject:
        arguments = json.dumps(call["function"].get("arguments", {}), ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": arguments}}

    return [
        {**m, "tool_calls": [dumped(call) for call in m["tool_calls"]]} if "tool_calls" in m else m
        for m in messages
    ]


def without_nulls(value: Any, keep: frozenset[str] = frozenset()) -> Any:
    """Return a value without the null entries of its objects; those of lists stay.

    Args:
        value: Of JSON.
        keep: Keys whose null is a value.
    """
    if isinstance(value, dict):
        return {k: without_nulls(v, keep) for k, v in value.items() if v is not None or k in keep}
    return [without_nulls(item, keep) for item in value] if isinstance(value, list) else value

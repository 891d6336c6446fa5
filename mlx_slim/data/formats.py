"""What a row says: Alpaca, chat, completions or text become one normal form.

Invariant: a row either becomes an ``Example`` (messages whose assistant turns are the answers, or a
prompt and a completion, or bare text), or is dropped with a reason (``Dropped``), or is wrong and
raises one line that names the place, the columns seen and the columns expected.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_slim.data.columns import answers, option, proposal, recognised
from mlx_slim.data.conversations import is_prompt_list, read_conversation, with_turns
from mlx_slim.data.sources import RawRow
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.reading import ChatMessage, JsonObject

EXPECTED = {
    "alpaca": "instruction, output (and input, system)",
    "chat": "messages [{role, content}] or conversations [{from, value}]",
    "completions": "prompt, completion, or question, answer, or the like (and context)",
    "text": "text",
}
COLUMNS = (
    *("instruction", "input", "output", "system"),
    *("messages", "conversations", "tools", "functions", "prompt", "completion", "text"),
    *("chosen", "rejected", "label"),
)


@dataclass(frozen=True)
class Example:
    """A row in normal form.

    Attributes:
        kind: ``alpaca``, ``chat``, ``completions`` or ``text``.
        messages: The row as a chat (empty for ``text``); every assistant turn is an answer.
        fields: The row's own strings, by our column names, for templates that name them.
        extras: What chat templates understand besides (``tools``).
        cut_turns: Turns after the last answer, left out because nothing is learned from them.
        weights: Loss weight of each message where the row gives them; None is 1 for every answer.
        notes: What is not done as the row says, for the ledger.
        label: Whether the answer is wanted, where rows have labels (``preference_rows.py``).
    """

    kind: str
    messages: list[ChatMessage] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)
    extras: JsonObject = field(default_factory=dict)
    cut_turns: int = 0
    weights: list[float] | None = None
    notes: tuple[str, ...] = ()
    label: bool | None = None

    @property
    def turn_weights(self) -> list[float]:
        """The loss weight of each message: 0 for what is no answer."""
        if self.weights is not None:
            return self.weights
        return [float(message["role"] == "assistant") for message in self.messages]

    @property
    def texts(self) -> list[str]:
        """Every string of the row, for comparing it with other texts."""
        if self.kind == "text":
            return [self.fields["text"]]
        return [message["content"] for message in self.messages]


class Dropped(Exception):
    """The row cannot be learned from; ``reason`` is its line in the ledger."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def check_columns(columns: Mapping[str, str]) -> None:
    """Refuse renames of columns that no format has, and two that name one column.

    Raises:
        SlimError: With the closest known name.
    """
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            raise SlimError(
                f"data.columns: {ours!r} is not a column of any format", did_you_mean(ours, COLUMNS)
            )
        if twins := [other for other in columns if other != ours and columns[other] == theirs]:
            raise SlimError(
                f"data.columns: {ours} and {twins[0]} both map to {theirs!r}",
                "give each its own column",
            )


def check_renamed(columns: Mapping[str, str], seen: set[str]) -> None:
    """Refuse renames of columns that no row had.

    Args:
        columns: Renames, ours to the files'.
        seen: The columns of all rows.

    Raises:
        SlimError: Names them, with the closest column that was seen.
    """
    if absent := [theirs for theirs in columns.values() if theirs not in seen]:
        names = ", ".join(map(repr, absent))
        raise SlimError(
            f"data.columns: no row has the column {names}", did_you_mean(absent[0], seen)
        )


def renamed_row(row: RawRow, columns: Mapping[str, str]) -> JsonObject:
    """Return the columns of a row under our names; ``columns`` maps ours to the file's."""
    present = {ours: theirs for ours, theirs in columns.items() if theirs in row.value}
    taken = set(present.values())
    renamed = {name: value for name, value in row.value.items() if name not in taken}
    return renamed | {ours: row.value[theirs] for ours, theirs in present.items()}


def read_example(
    row: RawRow,
    format: str,
    *,
    columns: Mapping[str, str],
    system: str | None,
    learn: str = "all",
) -> Example:
    """Return the normal form of a row.

    Args:
        row: The raw row.
        format: ``auto`` (decided from this row's own columns), or the format's name.
        columns: Renames, ours to the file's.
        system: System message where the row has none.
        learn: ``all`` answers of a conversation, or the ``last``.

    Raises:
        Dropped: If the row has no answer to learn.
        SlimError: If columns are missing or hold the wrong type.
    """
    present = {ours: theirs for ours, theirs in columns.items() if theirs in row.value}
    renamed = renamed_row(row, columns)
    if "system" not in renamed and "system_prompt" in renamed:
        renamed["system"] = renamed.pop("system_prompt")
    recognized = _recognized_names(row, renamed) if format == "auto" else {}
    renamed = _under(renamed, recognized)
    value = {key: item for key, item in renamed.items() if item is not None}
    kind = _kind(value) if format == "auto" else format
    if value.get("label") is False and kind in ("alpaca", "completions"):
        raise Dropped("label false: an answer that is not wanted")  # as TRL's KTOTrainer reads it
    if kind == "completions":
        value = with_turns(value)
    if kind == "chat" or (kind == "completions" and is_prompt_list(value)):
        return _chat(row, value, system, learn)
    columns_of = {
        "alpaca": ("instruction", "input", "output", "system"),
        "completions": ("prompt", "completion", "system"),
        "text": ("text",),
    }
    needed = {"alpaca": {"instruction", "output"}, "completions": {"prompt", "completion"}}
    if kind is None or not needed.get(kind, {"text"}) <= renamed.keys():
        raise _wrong_columns(row, format)
    called: dict[str, str] = {**recognized, **present}  # as the row calls its columns
    fields = {
        name: _string(row, value[name], called.get(name) or name)
        for name in columns_of[kind]
        if name in value
    }
    if kind == "text":
        _need(fields, "text", "empty text")
        return Example(kind, [], fields)
    system = fields.get("system") or system
    if kind == "completions":
        _need(fields, "completion", "empty answer")
        prompt, answer = fields.get("prompt", ""), fields["completion"]
    else:
        _need(fields, "instruction", "empty instruction")
        _need(fields, "output", "empty answer")
        lines = (fields["instruction"], fields.get("input", ""))
        prompt, answer = "\n".join(part for part in lines if part), fields["output"]
    fields |= {"prompt": prompt, "completion": answer, "system": system or ""}
    if kind == "alpaca" and (earlier := _history(row, value)):
        turns = _turns(system, prompt, answer)
        messages = [*turns[:-2], *earlier, *turns[-2:]]
        weights = None if learn == "all" else [0.0] * (len(messages) - 1) + [1.0]
        return Example("chat", messages, fields, weights=weights)
    return Example(kind, _turns(system, prompt, answer), fields)


def _recognized_names(row: RawRow, columns: JsonObject) -> dict[str, str]:
    """Return the renames, ours to the row's, of a row whose columns mean a known format.

    Columns that are null count only where the others do not say it: a row without its answer.

    Raises:
        SlimError: If ``text`` stands beside an answer, or a question and its answer, and does not
            hold them.
    """
    value = {key: item for key, item in columns.items() if item is not None}
    for names in (value, columns):
        beside = _complete(names) == {"text"}
        if _complete(names) and not beside:
            return {}
        if (renames := recognised(name for name in names if name != "text")) is not None:
            if beside:
                _refuse_beside(row, names["text"], names, renames)
            return renames
        if beside:
            for theirs in answers(names):
                _refuse_beside(row, names["text"], names, {"prompt": "text", "completion": theirs})
            return {}
    return {}


def _refuse_beside(
    row: RawRow, text: Any, value: Mapping[str, Any], renames: Mapping[str, str]
) -> None:
    """Refuse a row of which ``text`` does not hold the other texts that it could be read as.

    Raises:
        SlimError: With the option for either.
    """
    others = [theirs for theirs in renames.values() if theirs != "text"]
    if all(isinstance(value[one], str) and value[one].strip() in str(text) for one in others):
        return
    raise SlimError(
        f"{row.place} has both 'text' and {', '.join(others)}: it is unclear which one to train on",
        f"data.format=text trains on the text, {shlex.quote(option(renames))} on the answer",
    )


def _under(row: JsonObject, names: Mapping[str, str]) -> JsonObject:
    """Return a row under other names, ours to its own."""
    gone = {*names, *names.values()}
    rest = {key: item for key, item in row.items() if key not in gone}
    return rest | {ours: row[theirs] for ours, theirs in names.items()}


def _complete(value: Mapping[str, Any]) -> set[str]:
    """Return the columns that make a row one of a format; empty if it is of none."""
    for pair in ({"instruction", "output"}, {"prompt", "completion"}):
        if pair <= value.keys():
            return pair
    chat = {"messages", "conversations"} & value.keys()
    return chat or {"text"} & value.keys()


def _kind(value: Mapping[str, Any]) -> str | None:
    """Decide the format from the columns, in this order: the hub's Alpaca has ``text`` too."""
    if "messages" in value or "conversations" in value:
        return "chat"
    if "instruction" in value and "output" in value:
        return "alpaca"
    if "prompt" in value and "completion" in value:
        return "completions"
    if "text" in value:
        return "text"
    if "instruction" in value:
        return "alpaca"
    return "completions" if "prompt" in value else None


def _wrong_columns(row: RawRow, format: str) -> SlimError:
    seen = ", ".join(row.value) or "none"
    if format == "auto":
        expected = "; or ".join(f"{text} ({name})" for name, text in EXPECTED.items())
    else:
        expected = f"{EXPECTED[format]} ({format})"
    hint = proposal(row.value, format)
    if {"chosen", "rejected"} <= row.value.keys():
        hint = f"compare the answers with preference.loss=sigmoid (DPO), or {hint}"
    elif format != "auto" and (_complete(row.value) or recognised(row.value)):
        hint = "let the columns decide: data.format=auto"
    return SlimError(f"{row.place}: columns seen: {seen}; expected: {expected}", hint)


def _string(row: RawRow, text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise SlimError(
            f"{row.place}: {name!r} is {type(text).__name__} {repr(text)[:40]}, expected a string"
        )
    return text


def _need(fields: Mapping[str, str], name: str, reason: str) -> None:
    if not fields.get(name, "").strip():
        raise Dropped(reason)


def _turns(system: str | None, prompt: str, answer: str) -> list[ChatMessage]:
    first = [{"role": "system", "content": system}] if system else []
    return [
        *first,
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer},
    ]


def _history(row: RawRow, value: Mapping[str, Any]) -> list[ChatMessage]:
    """Return the turns before an Alpaca row, from its ``history`` of [question, answer] pairs."""
    turns: list[ChatMessage] = []
    pairs = value.get("history") or []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise SlimError(
                f"{row.place}: 'history' holds {str(pair)[:40]!r}, expected pairs of texts"
            )
        turns += _turns(None, *pair)
    return turns


def _chat(row: RawRow, value: Mapping[str, Any], system: str | None, learn: str) -> Example:
    if not {"messages", "conversations"} & value.keys() and not is_prompt_list(value):
        raise _wrong_columns(row, "chat")
    chat = read_conversation(row, value)
    messages, weights = list(chat.messages), list(chat.weights)
    system = value["system"] if isinstance(value.get("system"), str) else system
    if system and not (messages and messages[0]["role"] in ("system", "developer")):
        messages.insert(0, {"role": "system", "content": system})
        weights.insert(0, 0.0)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise Dropped("no assistant turn")
    if learn == "last":
        weights[: answers[-1]] = [0.0] * answers[-1]
    for message, weight in zip(messages, weights, strict=True):
        if weight and not message["content"].strip() and not message.get("tool_calls"):
            raise Dropped("empty answer")
    used = slice(answers[-1] + 1)
    if not any(weights[used]):
        raise Dropped("no answer to learn: weight 0")
    return Example(
        "chat",
        messages[used],
        {},
        {"tools": chat.tools} if chat.tools else {},
        cut_turns=len(messages) - len(messages[used]),
        weights=weights[used],
        notes=chat.notes,
    )

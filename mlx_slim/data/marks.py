r"""Where the strings of a conversation come out of a chat template.

Unique private-use characters are set into the strings, the template renders them, and their places
in the output are read off. Invariant: a placement is returned only if the output without its marks
is the output of the unmarked conversation, character by character; so no string is searched for,
and an answer that stands elsewhere in the text too is no trouble. Marks keep clear of white space
at the ends (templates strip it) and of tags that the template looks for (``</think>``).

    messages  user "Hi", assistant "<think>a</think>\n\nb"
    marked    "H①i", "②<think>③a</think>\n\n④b⑤"
    output    …assistant\n④b⑤<|im_end|>\n      turn 2 comes out from ④ to ⑤: its thought was cut
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import product
from typing import Any, NamedTuple

from mlx_slim.reading import ChatMessage

Messages = list[ChatMessage]

_FIRST, _LAST = 0xF0000, 0xFFFFD  # a plane of private use
MARKS = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")
TAG = re.compile(r"<\|?/?[\w｜][\w:.｜▁-]*\|?>|\[/?[A-Z][A-Z_]*\]|◁/?\w+▷")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


class Depth(Enum):
    """How much of a conversation is marked: the first that leaves the output alone is used."""

    ALL = 1  # every turn; of answers thoughts and tool calls too
    ANSWERS = 2
    CONTENTS = 3  # of answers, and not before a tag that they begin with


class Edges(NamedTuple):
    """Which white space of an answer comes out with it: tried from all to none."""

    leading: bool
    trailing: bool


def ways(messages: Messages) -> Iterator[tuple[Depth, Edges]]:
    """Yield the ways to mark a conversation, the most telling ones first."""
    answers = [m["content"] or "" for m in messages if m["role"] == "assistant"]
    leading = [True, False] if any(text != text.lstrip() for text in answers) else [True]
    trailing = [True, False] if any(text != text.rstrip() for text in answers) else [True]
    for depth in Depth:
        for edges in product(leading, trailing):
            yield depth, Edges(*edges)


class Kind(Enum):
    """What a mark stands at."""

    BEGIN = 1  # of an answer's text, or of what follows a tag in it
    END = 2
    CALL = 3
    ANCHOR = 4  # somewhere in a turn that is no answer
    PROBE = 5  # in place of an answer's text that is empty


@dataclass(frozen=True)
class Mark:
    """One mark: the number of its turn, and what it stands at."""

    turn: int
    kind: Kind


class MarkedChat:
    """A conversation with marks.

    Args:
        messages: The conversation.
        depth: What is marked.
        edges: Whether the white space at the ends of an answer stands between its marks.
        tags: Tags that the template mentions: ``tags_of``.
    """

    def __init__(
        self, messages: Messages, depth: Depth, edges: Edges, tags: frozenset[str]
    ) -> None:
        self.marks: list[Mark] = []
        self._depth, self._edges, self._tags = depth, edges, tags
        self.messages = [self._message(turn, m) for turn, m in enumerate(messages)]

    def _new(self, turn: int, kind: Kind) -> str:
        self.marks.append(Mark(turn, kind))
        return chr(_FIRST + len(self.marks) - 1)

    def _message(self, turn: int, message: ChatMessage) -> ChatMessage:
        if message["role"] != "assistant":
            return self._anchored(turn, message) if self._depth is Depth.ALL else message
        marked = {**message}
        if message["content"]:
            marked["content"] = self._answer(turn, message["content"], self._edges)
        if self._depth is Depth.CONTENTS:
            return marked
        for name in _THOUGHTS:
            if isinstance(message.get(name), str):
                marked[name] = self._answer(turn, message[name], Edges(False, False))
        if message.get("tool_calls"):
            marked["tool_calls"] = [self._leaves(turn, call) for call in message["tool_calls"]]
        return marked

    def _anchored(self, turn: int, message: ChatMessage) -> ChatMessage:
        text = message["content"]
        core = text.strip()
        tags = [m.span() for m in TAG.finditer(core) if m.group() in self._tags]
        last = len(core) - (1 if tags and tags[-1][1] == len(core) else 0)
        inside = {at for start, end in tags for at in range(start + 1, end)}
        places = [at for at in range(1, last + 1) if at not in inside]
        if not places:
            return message
        at = text.index(core) + places[len(places) // 2]
        mark = self._new(turn, Kind.ANCHOR)
        return {**message, "content": text[:at] + mark + text[at:]}

    def _answer(self, turn: int, text: str, edges: Edges) -> str:
        """Mark where a text begins and ends, and what follows each tag of the template."""
        core = text.strip()
        if not core:
            return text
        if edges.leading:
            core = text[: text.index(core)] + core
        if edges.trailing:
            core += text[text.index(core) + len(core) :]
        start = text.index(core)
        tags = [m for m in TAG.finditer(core) if m.group() in self._tags]
        bare = self._depth is Depth.CONTENTS and bool(tags) and tags[0].start() == 0
        marked, at = text[:start] + ("" if bare else self._new(turn, Kind.BEGIN)), 0
        for tag in tags:
            rest = core[tag.end() :].lstrip("\n" if edges.leading else None)
            if rest:
                begin = len(core) - len(rest)
                marked += core[at:begin] + self._new(turn, Kind.BEGIN)
                at = begin
        return marked + core[at:] + self._new(turn, Kind.END) + text[start + len(core) :]

    def _leaves(self, turn: int, value: Any) -> Any:
        """Mark the names and string arguments of a tool call at their ends."""
        if not isinstance(value, dict):
            return value
        function = value.get("function")
        if not isinstance(function, dict):
            return value
        marked = {**function}
        for name in ("name", "arguments"):
            if name in function:
                marked[name] = self._deep(turn, function[name])
        return {**value, "function": marked}

    def _deep(self, turn: int, value: Any) -> Any:
        if isinstance(value, str) and value.strip():
            core = value.rstrip()
            return core + self._new(turn, Kind.CALL) + value[len(core) :]
        if isinstance(value, dict):
            return {key: self._deep(turn, item) for key, item in value.items()}
        return [self._deep(turn, item) for item in value] if isinstance(value, list) else value

    def marked(self, turn: int) -> bool:
        """Return whether a turn has marks."""
        return any(mark.turn == turn for mark in self.marks)

    def probe(self, turn: int) -> Messages:
        """Return the conversation with a turn whose text is one more mark."""
        mark = self._new(turn, Kind.PROBE)
        return [{**m, "content": mark} if i == turn else m for i, m in enumerate(self.messages)]

    def placed(self, output: str) -> Placement | None:
        """Return the places of the marks in an output; None if a mark of a text occurs twice."""
        places: dict[int, int] = {}
        for number, at in _mark_places(output):
            if number >= len(self.marks):
                return None
            if number not in places:
                places[number] = at
            elif self.marks[number].kind is not Kind.CALL:  # a result may name its tool
                return None
        return Placement(MARKS.sub("", output), places, self.marks)


def _mark_places(output: str) -> Iterator[tuple[int, int]]:
    """Yield the number of each mark and its place in the output without marks."""
    for count, match in enumerate(MARKS.finditer(output)):
        yield ord(match.group()) - _FIRST, match.start() - count


@dataclass(frozen=True)
class Placement:
    """An output without its marks, and where these stood in it.

    Attributes:
        text: The output.
        places: Number of a mark -> where it stood, for those that came out.
        marks: All of them.
    """

    text: str
    places: dict[int, int]
    marks: list[Mark]

    def of(self, turn: int, *kinds: Kind) -> list[int]:
        """Return the places of a turn's marks of these kinds (none: of all), ascending."""
        every = self.places.items()
        return sorted(
            at for number, at in every
            if self.marks[number].turn == turn and (not kinds or self.marks[number].kind in kinds)
        )  # fmt: skip


def tags_of(source: str) -> frozenset[str]:
    """Return the tags that a template mentions."""
    return frozenset(TAG.findall(source))

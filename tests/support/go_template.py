"""The part of Go's ``text/template`` that Ollama's templates need, and Ollama's ``Modelfile``.

Messages are merged and handed over as Ollama does; what is not understood here is an error.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

_ACTION = re.compile(r"\{\{(- )?\s*((?:\"(?:\\.|[^\"\\])*\"|[^\"}])*?)( -)?\}\}", re.DOTALL)
_TOKEN = re.compile(r"\s*(\"(?:\\.|[^\"\\])*\"|:=|=|[(),]|\$?\.?\w+(?:\.\w+)*|\$|\.)")


@dataclass
class _Node:
    kind: str  # text, print, if, range, set
    value: str = ""
    body: list[_Node] = field(default_factory=list)
    other: list[_Node] = field(default_factory=list)


def _parse(template: str) -> list[_Node]:
    pieces: list[tuple[str, str]] = []
    end, trim = 0, False
    for match in _ACTION.finditer(template):
        text = template[end : match.start()]
        text = text.lstrip() if trim else text
        pieces.append(("text", text.rstrip() if match[1] else text))
        pieces.append(("action", match[2].strip()))
        end, trim = match.end(), bool(match[3])
    rest = template[end:]
    pieces.append(("text", rest.lstrip() if trim else rest))
    assert not any(kind == "text" and "{{" in text for kind, text in pieces), template
    nodes, left = _nodes(pieces)
    assert not left, left
    return nodes


def _nodes(pieces: list[tuple[str, str]]) -> tuple[list[_Node], list[tuple[str, str]]]:
    """Return nodes up to ``end`` or ``else``, and the pieces from there."""
    nodes: list[_Node] = []
    while pieces:
        (kind, value), rest = pieces[0], pieces[1:]
        word = value.split(" ", 1)[0]
        if kind == "text":
            nodes.append(_Node("text", value))
        elif word in ("end", "else"):
            return nodes, pieces
        elif word in ("if", "range"):
            node, rest = _branch(word, value[len(word) :], rest)
            nodes.append(node)
        elif re.match(r"\$\w+ :?= ", value):
            nodes.append(_Node("set", value))
        else:
            nodes.append(_Node("print", value))
        pieces = rest
    return nodes, []


def _branch(
    kind: str, value: str, pieces: list[tuple[str, str]]
) -> tuple[_Node, list[tuple[str, str]]]:
    body, pieces = _nodes(pieces)
    node = _Node(kind, value.strip(), body)
    action = pieces[0][1]
    if action == "else":
        node.other, pieces = _nodes(pieces[1:])
    elif action.startswith("else if"):
        inner, pieces = _branch("if", action.removeprefix("else if"), pieces[1:])
        node.other = [inner]
        return node, pieces
    assert pieces[0][1] == "end", pieces[0]
    return node, pieces[1:]


class _Scope:
    def __init__(self, root: Any) -> None:
        self.variables: dict[str, Any] = {"$": root}

    def value(self, text: str, dot: Any) -> Any:
        tokens, at, text = [], 0, text.strip()
        while at < len(text):
            match = _TOKEN.match(text, at)
            assert match is not None, text[at:]
            tokens.append(match[1])
            at = match.end()
        result, rest = self._call(tokens, dot)
        assert not rest, rest
        return result

    def _call(self, tokens: list[str], dot: Any) -> tuple[Any, list[str]]:
        functions = {
            "eq": lambda a, b: a == b,
            "ne": lambda a, b: a != b,
            "and": lambda *all_: next((one for one in all_ if not one), all_[-1]),
            "not": lambda one: not one,
            "len": len,
            "slice": lambda items, start: items[start:],
        }
        name, rest = tokens[0], tokens[1:]
        if name not in functions:
            return self._operand(tokens, dot)
        arguments = []
        while rest and rest[0] != ")":
            argument, rest = self._operand(rest, dot)
            arguments.append(argument)
        return functions[name](*arguments), rest

    def _operand(self, tokens: list[str], dot: Any) -> tuple[Any, list[str]]:
        token, rest = tokens[0], tokens[1:]
        if token == "(":
            value, rest = self._call(rest, dot)
            assert rest[0] == ")"
            return value, rest[1:]
        if token.startswith('"'):
            return _unquoted(token), rest
        if token.isdigit():
            return int(token), rest
        if token in ("true", "false"):
            return token == "true", rest
        head, *names = token.split(".")
        value = self.variables[head] if head.startswith("$") else dot
        assert head.startswith("$") or not head, token
        for name in filter(None, names):
            value = value[name]
        return value, rest

    def run(self, nodes: list[_Node], dot: Any) -> str:
        out = ""
        for node in nodes:
            if node.kind == "text":
                out += node.value
            elif node.kind == "print":
                out += self.value(node.value, dot)
            elif node.kind == "set":
                name, sign, text = node.value.split(" ", 2)
                assert (sign == "=") <= (name in self.variables), node.value
                self.variables[name] = self.value(text, dot)
            elif node.kind == "if":
                out += self.run(node.body if self.value(node.value, dot) else node.other, dot)
            else:
                names, text = node.value.split(" := ")
                index, item = names.split(", ")
                for number, value in enumerate(self.value(text, dot)):
                    self.variables |= {index: number, item: value}
                    out += self.run(node.body, value)
        return out


def _unquoted(token: str) -> str:
    text = re.sub(
        r"\\U([0-9a-f]{8})", lambda m: json.dumps(chr(int(m[1], 16)))[1:-1], token, flags=re.ASCII
    )
    return json.loads(text)


def render_go(template: str, messages: list[dict[str, Any]]) -> str:
    """Return what Ollama prompts a model with, without the BOS that its tokenizer adds."""
    merged: list[dict[str, str]] = []
    for message in messages:
        if merged and merged[-1]["Role"] == message["role"]:
            merged[-1]["Content"] += "\n\n" + message["content"]
        else:
            merged.append({"Role": message["role"], "Content": message["content"]})
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    root = {"Messages": merged, "System": system, "Response": ""}
    return _Scope(root).run(_parse(template), root)


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Return the instructions: (name, value), of ``PARAMETER`` with its own name."""
    instructions, lines = [], iter(text.split("\n"))
    for line in lines:
        if not line or line.startswith("#"):
            continue
        name, _, value = line.partition(" ")
        assert name in ("FROM", "TEMPLATE", "PARAMETER", "SYSTEM", "LICENSE"), line
        if name == "PARAMETER":
            name, _, value = value.partition(" ")
        if value.startswith('"""'):
            while len(value) < 6 or not value.endswith('"""'):
                value += "\n" + next(lines)
            value = value[3:-3]
        elif value.startswith('"'):
            assert len(value) > 1 and value.endswith('"'), line
            value = value[1:-1]
        instructions.append((name, value))
    return instructions

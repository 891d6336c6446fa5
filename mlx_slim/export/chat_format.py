"""What a chat template puts around the turns of a chat, and the same as a Go template for Ollama.

Ollama renders chats with a template of its own, in Go's language; a GGUF file's Jinja it compares
with a list of known ones at most. Invariant: what is returned was derived by rendering the model's
own template, and renders the same text on test chats, with and without a system message; a template
of another structure is refused, never approximated. Try it: ``mlx-slim export MODEL --to ollama -o
DIR`` and look at ``DIR/Modelfile``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from mlx_slim.data.chat_render import apply_chat_template
from mlx_slim.data.tokenize import unwrap
from mlx_slim.errors import SlimError
from mlx_slim.reading import ChatMessage

Render = Callable[[Sequence[ChatMessage], bool], str]
# Contents that no template has in itself; a number first, or an empty line, is a content too.
_SYSTEM, _USERS, _ANSWERS = "Qsystem0Q", ("Quser1Q", "Quser2Q", "Quser3Q"), ("Qsay1Q", "Qsay2Q")
_TEXTS = ("2 + 2 = {{ 4 }}\n\n  \"x\" 'y' \\n", "¿Qué? 漢字 🙂", "Qa <b>Q", "one\n\ttwo", "#")


@dataclass(frozen=True)
class ChatFormat:
    """The text before and after each kind of turn.

    Attributes:
        begin: Before the first turn.
        default: After ``begin`` where the first turn is not the system's.
        system: Around the system message.
        place: Where that stands: a turn of its own, or inside the first or the last user turn,
            between what is before its content and the content.
        user: Around what the user says.
        answer: Around what the model says.
        prompt: After the last turn, where an answer begins.
    """

    begin: str
    default: str
    system: tuple[str, str]
    place: Literal["own", "first", "last"]
    user: tuple[str, str]
    answer: tuple[str, str]
    prompt: str

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """Return a chat that ends with the user's turn, as the template of ``go`` renders it."""
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        users = [index for index, m in enumerate(messages) if m["role"] == "user"]
        at = {"first": users[0], "last": users[-1]}.get(self.place)
        text = self.begin + (self.default if messages[0]["role"] != "system" else "")
        for index, message in enumerate(messages):
            content = message["content"]
            if message["role"] == "user":
                before, after = self.user
                if index == at and system:
                    before += system.join(self.system)
                text += before + content + after
            elif message["role"] == "assistant":
                text += content.join(self.answer)
            elif self.place == "own":
                text += content.join(self.system)
        return text + self.prompt

    def go(self) -> str:
        """Return the Go template. Texts are quoted strings, so that space outside them is free."""
        (before_system, after_system), (before_user, after_user) = self.system, self.user
        inside = f"{go_text(before_system)}{{{{ $.System }}}}{go_text(after_system)}{{{{ end }}}}"
        lines, within = [], ""
        if self.place == "first":
            lines = ["{{- $first := true }}"]
            within = "{{ if and $first $.System }}" + inside + "{{ $first = false }}"
        elif self.place == "last":
            within = "{{ if and $last $.System }}" + inside
        lines += [
            "{{- range $i, $_ := .Messages }}",
            "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
        ]
        if self.begin or self.default:
            default = '{{ if ne .Role "system" }}' + go_text(self.default) + "{{ end }}"
            begin = go_text(self.begin) + (default if self.default else "")
            lines.append("{{- if eq $i 0 }}" + begin + "{{ end }}")
        branch = "{{- if"
        if self.place == "own":
            turn = f"{go_text(before_system)}{{{{ .Content }}}}{go_text(after_system)}"
            lines.append('{{- if eq .Role "system" }}' + turn)
            branch = "{{- else if"
        user = f"{go_text(before_user)}{within}{{{{ .Content }}}}{go_text(after_user)}"
        lines.append(branch + ' eq .Role "user" }}' + user)
        answer = f"{go_text(self.answer[0])}{{{{ .Content }}}}"
        answer += "{{ if not $last }}" + go_text(self.answer[1]) + "{{ end }}"
        lines += ['{{- else if eq .Role "assistant" }}' + answer, "{{- end }}"]
        if self.prompt:
            prompt = go_text(self.prompt) + "{{ end }}"
            lines.append('{{- if and $last (ne .Role "assistant") }}' + prompt)
        return "\n".join([*lines, "{{- end }}"])


def go_text(text: str) -> str:
    r"""Return the Go action that prints ``text``, nothing for none: ``{{ "<|user|>\n" }}``."""
    return f"{{{{ {go_quoted(text)} }}}}" if text else ""


def go_quoted(text: str) -> str:
    """Return ``text`` as a string of Go, in characters that a Modelfile keeps."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}
    return '"' + "".join(escapes.get(c, c if c.isprintable() else _code(c)) for c in text) + '"'


def _code(character: str) -> str:
    number = ord(character)
    return f"\\U{number:08x}" if number > 0xFFFF else f"\\u{number:04x}"


def find_format(tokenizer: Any) -> tuple[ChatFormat, list[str]]:
    """Return what the chat template of ``tokenizer`` puts around turns, and what it does besides.

    Args:
        tokenizer: mlx-lm's wrapper, with a chat template.

    Raises:
        SlimError: If no such format renders as the template does.
    """
    inner = unwrap(tokenizer)
    bos = inner.bos_token if inner("a").input_ids[:1] == [inner.bos_token_id] else None

    def render(messages: Sequence[ChatMessage], add_prompt: bool) -> str:
        """Return the text without the BOS that Ollama, whose tokenizer adds it too, puts there."""
        text = apply_chat_template(tokenizer, list(messages), add_generation_prompt=add_prompt)
        return text.removeprefix(bos or "")

    try:
        chat_format = _probe(render)
        for chat in _chats(_takes_system(render)):
            if chat_format.render(chat) != (expected := render(chat, True)):
                raise _refused(f"it renders {_difference(expected, chat_format.render(chat))}")
        notes = _besides(render, chat_format)
        text = apply_chat_template(tokenizer, _turns(_USERS[:1], ()))
    except TemplateError as error:
        raise _refused(f"it does not render a chat: {error}") from error
    if bos and not text.startswith(bos):
        notes.append(
            f"Ollama puts {bos} before a chat, as the tokenizer does; the template doesn't"
        )
    source = str(inner.chat_template)
    if "strftime_now" in source:
        notes.append("the template writes today's date; in Ollama it stays that of this export")
    if "tools" in source:
        notes.append("the template writes tools; in Ollama there are turns of text only")
    return chat_format, notes


def _probe(render: Render) -> ChatFormat:
    """Cut the texts between contents into what stands before and after each kind of turn."""
    one, two = _USERS[:2]
    chat = _turns(_USERS[:2], _ANSWERS)
    before, between, answered, ending = _cut(render(chat, True), one, _ANSWERS[0], two)
    _, ended = _cut(render(chat[:1], False), one)
    _, closed = _cut(render(chat[:2], False), _ANSWERS[0])
    after_user = _common_start(ended, between, ending)
    # The first turn may begin otherwise than a later one; both end with what is before the content.
    shared = answered[len(_common_start(closed, answered)) :]
    before_user = _common_end(shared, before)
    start = before.removesuffix(before_user)
    place, begin, system = _system(render, start, before_user)
    return ChatFormat(
        begin=begin,
        default=start.removeprefix(begin),
        system=system,
        place=place,
        user=(before_user, after_user),
        answer=(between.removeprefix(after_user), answered.removesuffix(before_user)),
        prompt=ending.removeprefix(after_user),
    )


def _system(
    render: Render, start: str, before_user: str
) -> tuple[Literal["own", "first", "last"], str, tuple[str, str]]:
    """Return where a system message stands, what begins every chat, and what is around it."""
    if not _takes_system(render):  # as templates do that have a place for it
        return "first", start, ("", "\n\n")
    chat = [_turn("system", _SYSTEM), *_turns(_USERS[:2], _ANSWERS)]
    text = render(chat, True)
    if text.count(_SYSTEM) != 1:
        raise _refused("it writes a system message not once")
    if text.index(_SYSTEM) > text.index(_ANSWERS[0]):
        _, _, behind, after, _ = _cut(text, _USERS[0], _ANSWERS[0], _SYSTEM, _USERS[1])
        _, separator, before = behind.rpartition(before_user) if before_user else ("", "", behind)
        if separator == before_user:
            return "last", start, (before, after)
    before, after, _ = _cut(text, _SYSTEM, _USERS[0])
    inside = start + before_user
    if before.startswith(inside) and not after.endswith(before_user):
        return "first", start, (before.removeprefix(inside), after)
    begin = start if before.startswith(start) else ""
    return "own", begin, (before.removeprefix(begin), after.removesuffix(before_user))


def _takes_system(render: Render) -> bool:
    try:
        text = render([_turn("system", _SYSTEM), *_turns(_USERS[:1], ())], True)
    except TemplateError:
        return False
    return _SYSTEM in text


def _turn(role: str, content: str) -> ChatMessage:
    return {"role": role, "content": content}


def _turns(users: Sequence[str], answers: Sequence[str]) -> list[ChatMessage]:
    pairs = itertools.zip_longest(users, answers[: len(users) - 1])
    rounds = [[_turn("user", user), _turn("assistant", answer or "")] for user, answer in pairs]
    return list(itertools.chain(*rounds))[: 2 * len(users) - 1]


def _cut(text: str, *contents: str) -> list[str]:
    """Return what is before, between and after ``contents``, which ``text`` holds in this order."""
    pieces = []
    for content in contents:
        if text.count(content) != 1:
            raise _refused(f"it writes a turn {text.count(content)} times")
        part, text = text.split(content)
        pieces.append(part)
    return [*pieces, text]


def _common_start(*texts: str) -> str:
    alike = itertools.takewhile(lambda each: len(set(each)) == 1, zip(*texts, strict=False))
    return "".join(each[0] for each in alike)


def _common_end(one: str, other: str) -> str:
    return _common_start(one[::-1], other[::-1])[::-1]


def _chats(system: bool) -> list[list[ChatMessage]]:
    """Return chats of one to three questions, of plain and of odd contents."""
    chats = []
    for users, answers in ((_USERS, _ANSWERS), (_TEXTS[:3], _TEXTS[3:])):
        for count in range(1, 4):
            chat = _turns(users[:count], answers)
            chats.append(chat)
            if system:
                chats.append([_turn("system", f"{_SYSTEM}\n\n{_TEXTS[1]}"), *chat])
    return chats


def _besides(render: Render, chat_format: ChatFormat) -> list[str]:
    """Return what the template does that ``chat_format`` does not, for people."""
    notes = []
    if not _takes_system(render):
        notes.append("the template takes no system message: Ollama puts one before the first text")
    chat = _turns([f" {_USERS[0]}\n", _USERS[1]], _ANSWERS)
    if chat_format.render(chat) != render(chat, True):
        notes.append("the template cuts space around texts, which Ollama does not")
    chat = _turns(_USERS[:2], [f"<think>\n{_USERS[2]}\n</think>\n\n{_ANSWERS[0]}"])
    if chat_format.render(chat) != render(chat, True):
        notes.append("the template drops the reasoning of earlier answers, which Ollama keeps")
    return notes


def _difference(expected: str, got: str) -> str:
    start = len(_common_start(expected, got))
    return f"{expected[start : start + 30]!r} where turns in order give {got[start : start + 30]!r}"


def _refused(reason: str) -> SlimError:
    return SlimError(
        f"this chat template cannot become one of Ollama: {reason}",
        "export --to gguf writes the file without one; write TEMPLATE by hand (docs/export.md)",
    )

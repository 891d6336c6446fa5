"""Rows through a chat template in Jinja: the text, and exactly which characters are answers.

Invariant: the template is the model's own, and nothing that a row has is lost in it unsaid: a tool
call or an answer that does not come out is refused, tools, system messages and reasoning are
counted. Spans come from the template's ``{% generation %}`` marks where it has them, else from
renderings (``spans.py``); a row whose answers cannot be told from the rest is refused. Try it:
``mlx-slim data preview smollm2-lora``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from mlx_slim.data.chat_render import REASONING, render_chat
from mlx_slim.data.conversations import with_text_arguments
from mlx_slim.data.formats import Example
from mlx_slim.data.marks import MarkedChat, Messages, tags_of, ways
from mlx_slim.data.rendered import Rendered
from mlx_slim.data.spans import Borders, behind_newlines, unclear
from mlx_slim.errors import SlimError
from mlx_slim.reading import JsonObject

TOOLS_LEFT_OUT = "tools that the template leaves out"
REASONING_LEFT_OUT = "reasoning that the template leaves out"

Span = tuple[int, int]
# Messages and names -> the text, and the spans of its generation marks.
Render = Callable[..., tuple[str, list[Span]]]


def eos_texts(tokenizer: Any) -> list[str]:
    """Return the texts of the tokens that may close a turn."""
    ends = [tokenizer.eos_token, *(getattr(tokenizer, "all_special_tokens", None) or [])]
    closing = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<turn|>", "<|eom_id|>")
    return list(dict.fromkeys(e for e in ends if e and (e == tokenizer.eos_token or e in closing)))


def renderer(source: str, special: dict[str, str], *, strict: bool = False) -> Render:
    """Render as transformers does, within bounds; ``strict`` refuses names that are not given."""

    def render(messages: Messages, **names: Any) -> tuple[str, list[Span]]:
        return render_chat(source, messages, strict=strict, **{**special, **names})

    return render


def left_out(example: Example, template: str) -> tuple[str, ...]:
    """Return what a template that knows neither tools nor tool calls leaves out of a row.

    Raises:
        SlimError: If that is a tool call.
    """
    for turn, message in enumerate(example.messages):
        for call in message.get("tool_calls", ()):
            raise _calls_refused(turn, call, template)
    tools = (TOOLS_LEFT_OUT,) if example.extras.get("tools") else ()
    return (*tools, *_reasoning_left_out(example.messages, ""))


def _reasoning_left_out(messages: Messages, text: str) -> list[str]:
    """Return a note if the reasoning of an answer is not in the rendered text."""
    thoughts = [m.get(n) for m in messages if m["role"] == "assistant" for n in REASONING]
    lost = any(isinstance(one, str) and one.strip() not in text for one in thoughts)
    return [REASONING_LEFT_OUT] if lost else []


def _calls_refused(turn: int, call: JsonObject, template: str) -> SlimError:
    name = str(call["function"].get("name"))
    return SlimError(
        f"turn {turn + 1}: {template} does not write the call of the tool {name!r}, so the "
        "model would learn to answer without it",
        "use a model whose chat template writes tool calls, a template of your own "
        "(data.template=FILE), or rows without tool calls",
    )


@dataclass(frozen=True)
class _Chat:
    """A conversation and its rendering: the spans are those of generation marks."""

    messages: Messages
    extras: JsonObject
    text: str
    generated: list[Span]


class ChatTemplate:
    """Render messages and find every answer in the text.

    Args:
        render: Renders the template.
        source: Its Jinja source.
        eos_texts: Texts of the tokens that may close a turn.
    """

    def __init__(self, render: Render, source: str, eos_texts: list[str]) -> None:
        self._render, self._tags = render, tags_of(source)
        self._nones = source.count("None")
        self._eos_texts = eos_texts

    def __call__(self, example: Example) -> Rendered:
        """Return the row as text.

        Raises:
            SlimError: If the template refuses the row, leaves out a tool call or an answer, or if
                an answer cannot be told from what stands around it.
        """
        chat = self._chat(example.messages, example.extras)
        notes = [*self._left_out(chat), *_reasoning_left_out(chat.messages, chat.text)]
        borders = self._borders(chat)
        if borders is not None:
            notes += _missing(chat.messages, borders)
        answers = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
        if chat.generated:
            return self._generated(chat, borders, answers, example.turn_weights, notes)
        if borders is None:
            spans = [self._by_prefix(chat, turn) for turn in answers]
        else:
            spans = [borders.span(turn) for turn in answers]
        text, spans = self._to_the_end(chat, spans)
        for turn, (_, end), (start, _) in zip(answers, [(0, 0), *spans], spans, strict=False):
            if start < end:
                raise unclear(turn)
        weights = [example.turn_weights[turn] for turn in answers]
        return Rendered(text, spans, True, weights, tuple(notes))

    # ------------------------------------------------------------------ the text

    def _text(
        self, messages: Messages, extras: JsonObject, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        try:
            return self._render(messages, add_generation_prompt=prompt, **extras)
        except TemplateError as error:
            raise SlimError(
                f"the chat template refuses this row: {' '.join(str(error).split())[:200]}",
                "fix the row, or choose data.template=chatml, alpaca or plain",
            ) from error

    def _tried(self, messages: Messages, extras: JsonObject, prompt: bool) -> str | None:
        try:
            return self._text(messages, extras, prompt)[0]
        except SlimError:
            return None

    def _chat(self, messages: Messages, extras: JsonObject) -> _Chat:
        """Render in the first form that the template understands: see ``_forms``."""
        tried = []
        for form in _forms(messages):
            chat = self._in_form(form, extras)
            if isinstance(chat, _Chat):
                return chat
            tried.append(chat)
        raise tried[0]

    def _in_form(self, form: Messages, extras: JsonObject) -> _Chat | SlimError:
        try:
            chat = _Chat(form, extras, *self._text(form, extras))
            self._check_calls(chat)
        except SlimError as error:
            return error
        return chat

    def _check_calls(self, chat: _Chat) -> None:
        """Refuse tool calls that do not come out, or not as JSON."""
        for turn, message in enumerate(chat.messages):
            for call in message.get("tool_calls", ()):
                calls = [other for other in message["tool_calls"] if other is not call]
                less = {k: v for k, v in message.items() if k != "tool_calls"}
                less |= {"tool_calls": calls} if calls else {}
                without = [*chat.messages[:turn], less, *chat.messages[turn + 1 :]]
                if self._tried(without, chat.extras, False) == chat.text:
                    raise _calls_refused(turn, call, "the chat template")
        contents = "".join(message["content"] or "" for message in chat.messages)
        printed = [repr(f["arguments"]) for f in _functions(chat.messages) if f.get("arguments")]
        silent = any(message["content"] is None for message in chat.messages)
        if any(text in chat.text and text not in contents for text in printed) or (
            silent and chat.text.count("None") > contents.count("None") + self._nones
        ):
            raise SlimError(
                "the chat template writes tool calls as Python, not as JSON",
                "use a template that writes them with | tojson",
            )

    def _left_out(self, chat: _Chat) -> list[str]:
        """Return whether tools do not come out."""
        if not chat.extras.get("tools"):
            return []
        rest = {key: value for key, value in chat.extras.items() if key != "tools"}
        ignored = self._tried(chat.messages, rest, False) == chat.text
        return [TOOLS_LEFT_OUT] if ignored else []

    # ------------------------------------------------------------------ the spans

    def _borders(self, chat: _Chat) -> Borders | None:
        """Mark as much of the conversation as leaves the text alone; None if nothing does."""
        for depth, edges in ways(chat.messages):
            marked = MarkedChat(chat.messages, depth, edges, self._tags)
            output = self._tried(marked.messages, chat.extras, False)
            whole = None if output is None else marked.placed(output)
            if whole is not None and whole.text == chat.text:
                return Borders(
                    marked,
                    whole,
                    lambda messages, prompt: self._tried(messages, chat.extras, prompt),
                    self._eos_texts,
                )
        return None

    def _by_prefix(self, chat: _Chat, turn: int) -> Span:
        """Return a turn's span where both its prompt and its end are prefixes of the text."""
        prompt = self._tried(chat.messages[:turn], chat.extras, True) if turn else None
        through = self._tried(chat.messages[: turn + 1], chat.extras, False)
        if prompt is None or through is None or not chat.text.startswith(through):
            raise unclear(turn)
        if not through.startswith(prompt) or through == prompt:
            raise unclear(turn)
        return len(prompt), len(through)

    def _to_the_end(self, chat: _Chat, spans: list[Span]) -> tuple[str, list[Span]]:
        """Let the last span reach the end of the text, less a prompt that always stands there."""
        start, end = spans[-1]
        rest = chat.text[end:]
        if not rest:
            return chat.text, spans
        if rest.strip() and self._tried(chat.messages, chat.extras, True) == chat.text:
            return chat.text[:end], spans
        return chat.text, [*spans[:-1], (start, len(chat.text))]

    def _generated(
        self,
        chat: _Chat,
        borders: Borders | None,
        answers: list[int],
        turn_weights: list[float],
        notes: list[str],
    ) -> Rendered:
        """Return the row with the spans of the template's generation marks."""
        spans = [(a, self._closing(chat.text, b)) for a, b in chat.generated]
        if borders is not None:
            turns = [_turn_of(borders, span) for span in spans]
        elif len(spans) == len(answers):
            turns = list(answers)
        else:
            raise unclear(answers[0])
        if any(turn not in answers for turn in turns):
            raise SlimError(
                "the chat template has generation marks around text that is not the assistant's",
                "fix its {% generation %} marks, or choose another data.template",
            )
        if set(answers) - set(turns):
            notes = [*notes, "answers without generation marks of the template (not learned)"]
        weights = [turn_weights[turn] for turn in turns]
        return Rendered(chat.text, spans, True, weights, tuple(notes))

    def _closing(self, text: str, end: int) -> int:
        """Move the end of a marked span over the EOS that follows it."""
        for eos in self._eos_texts:
            if text.startswith(eos, end):
                return behind_newlines(text, end + len(eos))
        return end


def _turn_of(borders: Borders, span: Span) -> int:
    """Return the turn whose text is in a span, or next to it."""
    start, end = span
    places = sorted((at, borders.chat.marks[n].turn) for n, at in borders.whole.places.items())
    inside = [turn for at, turn in places if start <= at <= end]
    behind = [turn for at, turn in places if at > end]
    return (inside or behind or [turn for _, turn in places[-1:]] or [-1])[0]


def _missing(messages: Messages, borders: Borders) -> list[str]:
    """Refuse answers that do not come out; return what other texts do not."""
    notes = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            if not (message["content"] or "").strip() or borders.text_comes_out(turn):
                continue
            if message.get("tool_calls"):
                notes.append("text beside tool calls that the template leaves out")
            elif not borders.comes_out(turn):
                raise SlimError(
                    f"turn {turn + 1}: the chat template leaves out the answer",
                    "fix the row, or choose another data.template",
                )
        elif borders.chat.marked(turn) and not borders.comes_out(turn):
            notes.append(f"{message['role']} messages that the template leaves out")
    return list(dict.fromkeys(notes))


# ---------------------------------------------------------------------- tool calls


def _functions(messages: Messages) -> Iterator[JsonObject]:
    for message in messages:
        for call in message.get("tool_calls", ()):
            yield call["function"]


def _forms(messages: Messages) -> Iterator[Messages]:
    """Yield a conversation in the forms that templates ask for tool calls in, the commonest first.

    Arguments are an object, or JSON text for templates that print them as they are; the text of a
    turn that only calls is empty, or null for templates that look for that.
    """
    if not any("tool_calls" in message for message in messages):
        yield messages
        return
    for silent in ("", None):
        form = [
            {**m, "content": m["content"] or silent} if "tool_calls" in m else m for m in messages
        ]
        yield form
        yield with_text_arguments(form)

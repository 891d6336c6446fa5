"""Chat templates, rendered as transformers renders them, within bounds.

Invariant: for the messages that rows and prompts hold, the text is the one of transformers'
``apply_chat_template`` (tested over templates of real models); what differs is that time, size and
depth are bounded (``config/sandbox.py``), and that everything that a template raises is a
``TemplateError``. Try it: ``mlx-slim data preview smollm2-lora``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, TemplateRuntimeError, Undefined, nodes, pass_eval_context
from jinja2.ext import Extension, loopcontrols

from mlx_slim.config.sandbox import BoundedEnvironment, BoundedTemplate, guarded
from mlx_slim.config.sandbox_budget import budget
from mlx_slim.reading import ChatMessage

Spans = list[tuple[int, int]]
# The first is what templates read; the others are older names of it (as in transformers).
REASONING = ("reasoning_content", "thinking", "reasoning")


class _Generation(Extension):
    """``{% generation %} … {% endgeneration %}``: marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own shape)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _marked(self, _: Any, caller: Any) -> str:
        text, used = caller(), budget()
        used.spans.append((used.output_length, used.output_length + len(text)))
        return text


@lru_cache(maxsize=2)
def _environment(strict: bool) -> BoundedEnvironment:
    return BoundedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        undefined=StrictUndefined if strict else Undefined,
    )


@lru_cache(maxsize=32)
def _compiled(source: str, strict: bool) -> BoundedTemplate:
    return BoundedTemplate(_environment(strict), source)


def parse_chat(source: str, *, strict: bool = False) -> nodes.Template:
    """Return the syntax tree of a template, compiled once to see that it can be.

    Raises:
        TemplateError: If it is not Jinja, or too large.
    """
    _compiled(source, strict)
    return guarded(lambda: _environment(strict).parse(source), source)


def render_chat(
    source: str, messages: list[ChatMessage], *, strict: bool = False, **names: Any
) -> tuple[str, Spans]:
    """Return the text of a chat, and what its ``{% generation %}`` marks enclose.

    Args:
        source: The template.
        messages: Its turns.
        strict: Refuse names that are not given.
        **names: Special tokens, ``tools``, ``add_generation_prompt`` and what else it reads.

    Raises:
        TemplateError: The template refuses the chat, fails, or takes more than it may.
    """
    tools = names.pop("tools", None)
    if tools is not None and not all(isinstance(tool, Mapping) for tool in tools):
        raise TemplateRuntimeError("tools: expected a list of objects")
    values = {"tools": tools, "documents": None, "add_generation_prompt": False, **names}
    chat = [_with_reasoning(message) for message in messages]
    return _compiled(source, strict).render_marked(_plain({"messages": chat, **values}))


def none_default(templates: Iterable[str]) -> str:
    """Return what is wrong where several named templates have no default."""
    names = ", ".join(templates)
    return f"the model has several chat templates ({names}), none called default"


def apply_chat_template(tokenizer: Any, messages: list[ChatMessage], **names: Any) -> str:
    """Return the prompt of a chat up to where the answer begins.

    Args:
        tokenizer: Hugging Face's, or mlx-lm's wrapper around it, which tells templates whether the
            model thinks.
        messages: The turns.
        **names: ``tools`` and what else the template reads.

    Raises:
        TemplateError: The template refuses the chat, fails, or takes more than it may.
    """
    from transformers import PreTrainedTokenizerBase

    inner: Any = getattr(tokenizer, "_tokenizer", None)
    wrapped = hasattr(inner, "apply_chat_template")
    inner = inner if wrapped else tokenizer
    overrides = type(inner).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    without_nulls = [{key: item for key, item in m.items() if item is not None} for m in messages]
    names = {"add_generation_prompt": True, **names}
    try:
        if overrides or getattr(tokenizer, "_chat_template", None) is not None:  # Python, no Jinja
            return str(tokenizer.apply_chat_template(without_nulls, tokenize=False, **names))
        source = inner.get_chat_template(tools=names.get("tools"))
    except Exception as error:
        templates = inner.chat_template
        several = none_default(templates) if isinstance(templates, dict) else ""
        raise TemplateRuntimeError(several or str(error) or type(error).__name__) from error
    thinks = {"enable_thinking": tokenizer.has_thinking} if wrapped else {}
    return render_chat(source, without_nulls, **{**inner.special_tokens_map, **thinks, **names})[0]


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Name a turn's reasoning as every template reads it."""
    if not isinstance(message, Mapping):
        raise TemplateRuntimeError("a turn is not an object")
    values = (message[name] for name in REASONING if message.get(name) is not None)
    reasoning = next(values, None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """Rebuild a value of plain JSON types: others have methods that no sandbox knows."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value) if type(value) in (list, tuple) else [
            _plain(item) for item in value]  # fmt: skip
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"

"""Jinja files of the user as templates: over messages, or over a row's named fields.

Invariant: a file sees only the names that a row has (``VARIABLES``) and is refused with its line if
it names another; it runs in a sandbox. Try it:
``mlx-slim data preview smollm2-lora data.template=mine.jinja``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes

from mlx_slim.config.sandbox import LONGEST_SOURCE
from mlx_slim.data.chat_render import parse_chat
from mlx_slim.data.chat_template import ChatTemplate, Render, eos_texts, left_out, renderer
from mlx_slim.data.formats import Example
from mlx_slim.data.rendered import Rendered
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.reading import read_text

VARIABLES = {
    *("messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "raise_exception"),
    *("instruction", "input", "output", "prompt", "completion", "text", "system"),
}
_MARKER = "ANSWER-STANDS-HERE"


def read_jinja(path: Path, tokenizer: Any) -> tuple[str, Callable[[Example], Rendered]]:
    """Load a Jinja file: sandboxed, and strict about names.

    Returns:
        What decides the text, for hashing, and how a row is rendered.

    Raises:
        SlimError: If the file cannot be read, is not Jinja, or names what no row has.
    """
    source = read_text(path, 4 * LONGEST_SOURCE)
    try:
        syntax = parse_chat(source, strict=True)
    except TemplateError as error:
        line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise SlimError(f"{path.name}{line}: {error.message}") from error
    used = meta.find_undeclared_variables(syntax)
    for name in sorted(used - VARIABLES):
        at = [n.lineno for n in syntax.find_all(nodes.Name) if n.name == name]
        raise SlimError(
            f"{path.name}, line {min(at, default=1)}: undefined variable {name!r}",
            did_you_mean(name, VARIABLES),
        )
    special = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token or ""}

    render = renderer(source, special, strict=True)
    chat = ChatTemplate(render, source, eos_texts(tokenizer))

    def row(example: Example) -> Rendered:
        over_messages = "messages" in used and example.kind != "text"
        whole = chat(example) if over_messages else _by_fields(example, render)
        bos = special["bos_token"]
        return replace(whole, has_bos=bool(bos) and whole.text.startswith(bos))

    return f"{special} {source}", row


def _by_fields(example: Example, render: Render) -> Rendered:
    """Render a template over named fields; the answer is where a marker in its place comes out."""
    notes = left_out(example, "the template")
    names = dict.fromkeys(("instruction", "input", "output", "text", "system"), "")
    names |= {"prompt": "", "completion": "", "add_generation_prompt": False}
    if example.kind == "chat":
        turns = [m for m in example.messages if m["role"] not in ("system", "developer")]
        if [m["role"] for m in turns] != ["user", "assistant"]:
            raise SlimError(
                f"a chat of {len(turns)} turns, but the template does not use 'messages'",
                "loop over messages in the template, or choose data.template=chatml",
            )
        system = example.messages[0]["content"] if len(example.messages) > 2 else ""
        names |= {"prompt": turns[0]["content"], "completion": turns[1]["content"]}
        names["system"] = system
    names |= example.fields
    names["instruction"] = names["instruction"] or names["prompt"]
    names["output"] = names["output"] or names["completion"]
    try:
        full, _ = render(example.messages, **names)
        if example.kind == "text":
            return Rendered(full, [(0, len(full))])
        marked, _ = render(example.messages, **{**names, "output": _MARKER, "completion": _MARKER})
    except TemplateError as error:
        raise SlimError(f"the template refuses this row: {error}") from error
    before, matched, _ = marked.partition(_MARKER)
    if not matched or not full.startswith(before):
        raise SlimError(
            "the template does not write the answer unchanged where it has 'output' or 'completion'"
        )
    weights = [example.turn_weights[-1]]
    return Rendered(full, [(len(before), len(full))], weights=weights, notes=notes)

"""How a model reads a row: the text, and which characters of it are answers.

Invariant: ``render`` gives the whole text once, with the character spans that the model is to learn
(each answer and what closes it); the tokenizer sees exactly this text. The chat template is the
model's own, byte for byte. Try it: ``mlx-slim data preview smollm2-lora data.template=alpaca``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_slim.artifacts import hash_bytes
from mlx_slim.data.formats import Example
from mlx_slim.errors import SlimError, did_you_mean

NAMES = ("auto", "model", "alpaca", "plain", "chatml")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKER = "ANSWER-STANDS-HERE"
_VARIABLES = {
    *("messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "raise_exception"),
    *("instruction", "input", "output", "prompt", "completion", "text", "system"),
}

# The Stanford Alpaca prompt, as the ``text`` column of tatsu-lab/alpaca has it.
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
)
_ALPACA_ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n"
)


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        text: All of it.
        spans: Character ranges [start, end) of the answers, each with what closes it.
        own_bos: The template writes the BOS token itself, if the model wants one.
    """

    text: str
    spans: list[tuple[int, int]]
    own_bos: bool = False

    def cut(self, start: int, end: int, head: int = 0) -> Rendered:
        """Return the first ``head`` characters, then [start, end) and the spans in them."""
        text, shift = self.text[:head] + self.text[start:end], head - start
        inside = [(max(a, start) + shift, min(b, end) + shift) for a, b in self.spans]
        return replace(self, text=text, spans=[(a, b) for a, b in inside if a < b])


@dataclass(frozen=True)
class Template:
    """A way to render rows.

    Attributes:
        name: What the recipe said, resolved (``model``, ``alpaca``, …).
        key: Hash of everything that decides the text.
        render: Example → Rendered; raises SlimError without the row's place.
    """

    name: str
    key: str
    render: Callable[[Example], Rendered]


def load_template(setting: str, tokenizer: Any) -> Template:
    """Return the template of ``data.template``.

    Args:
        setting: A name of ``NAMES``, or the path of a Jinja file.
        tokenizer: Hugging Face tokenizer (its chat template and special tokens are read).

    Raises:
        SlimError: If the name is unknown, the file is missing or no Jinja, or the model has no
            chat template though ``model`` was asked for.
    """
    eos = tokenizer.eos_token or ""
    chat = getattr(tokenizer, "chat_template", None)
    named: dict[str, Callable[[Example], Rendered]] = {
        "alpaca": lambda example: _alpaca(example, eos),
        "plain": lambda example: _plain(example, eos),
        "chatml": _chatml,
    }
    if setting in named:
        return Template(setting, hash_bytes(f"{setting} 1 {eos}".encode()), named[setting])
    if setting == "auto" and not chat:
        by_kind = {"alpaca": "alpaca", "chat": "chatml"}
        return Template(
            "auto (no chat template: alpaca, chatml or plain by row)",
            hash_bytes(f"auto 1 {eos}".encode()),
            lambda example: named[by_kind.get(example.kind, "plain")](example),
        )
    if setting in ("auto", "model"):
        if not chat:
            raise SlimError(
                "data.template=model, but the model has no chat template",
                "use data.template=auto, alpaca, plain or chatml",
            )
        source = tokenizer.get_chat_template()
        special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        renderer = _ChatTemplate(_hub_render(source, special), source, _eos_texts(tokenizer))
        return Template("model", hash_bytes(f"model 1 {special} {source}".encode()), renderer)
    return _custom(setting, tokenizer)


# ---------------------------------------------------------------------- built-in templates


def _pieces(parts: list[tuple[str, bool]]) -> Rendered:
    """Join (text, is an answer) pieces."""
    text, spans = "", []
    for piece, answer in parts:
        if answer:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return Rendered(text, spans)


def _bare(example: Example) -> Rendered:
    return _pieces([(example.fields["text"], True)])


def _closed(example: Example, index: int, eos: str) -> str:
    """The answer and its EOS; the last answer's EOS is left to the tokenizer's own id."""
    content = example.messages[index]["content"]
    return content if index == len(example.messages) - 1 else content + eos


def _alpaca(example: Example, eos: str) -> Rendered:
    if example.kind == "text":
        return _bare(example)
    parts: list[tuple[str, bool]] = []
    given = example.fields.get("input", "")
    preamble = _ALPACA_INPUT if given else _ALPACA_ALONE
    for index, message in enumerate(example.messages):
        gap = "\n\n" if parts else ""
        if message["role"] in ("system", "developer"):
            preamble = message["content"].rstrip() + "\n\n"
            continue
        if message["role"] == "assistant":
            parts += [(f"{gap}### Response:\n", False), (_closed(example, index, eos), True)]
            continue
        text = example.fields["instruction"] if example.kind == "alpaca" else message["content"]
        block = f"### Instruction:\n{text}" + (f"\n\n### Input:\n{given}" if given else "")
        parts.append((gap + (preamble if not parts else "") + block, False))
    return _pieces(parts)


def _plain(example: Example, eos: str) -> Rendered:
    if example.kind == "text":
        return _bare(example)
    if example.kind == "completions":
        system = example.fields["system"]
        prompt = f"{system}\n\n{example.fields['prompt']}" if system else example.fields["prompt"]
        return _pieces([(prompt, False), (example.fields["completion"], True)])
    parts: list[tuple[str, bool]] = []
    for index, message in enumerate(example.messages):
        if message["role"] == "assistant":
            parts.append((_closed(example, index, eos), True))
        else:
            parts.append((("\n" if parts else "") + message["content"] + "\n", False))
    return _pieces(parts)


def _chatml(example: Example) -> Rendered:
    if example.kind == "text":
        return _bare(example)
    parts: list[tuple[str, bool]] = []
    for message in example.messages:
        parts.append((f"<|im_start|>{message['role']}\n", False))
        parts.append((f"{message['content']}<|im_end|>\n", message["role"] == "assistant"))
    return _pieces(parts)


# ---------------------------------------------------------------------- Jinja templates

_Render = Callable[..., tuple[str, list[tuple[int, int]]]]


def _eos_texts(tokenizer: Any) -> list[str]:
    """Texts of the tokens that may close a turn."""
    ends = [tokenizer.eos_token, *(getattr(tokenizer, "all_special_tokens", None) or [])]
    closing = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<turn|>", "<|eom_id|>")
    return list(dict.fromkeys(e for e in ends if e and (e == tokenizer.eos_token or e in closing)))


def _hub_render(source: str, special: dict[str, str]) -> _Render:
    """Render the way ``apply_chat_template`` does (sandboxed), with its answer spans if marked."""
    from transformers.utils.chat_template_utils import render_jinja_template

    marked = bool(_GENERATION.search(source))

    def render(messages: list[dict[str, Any]], **names: Any) -> tuple[str, list[tuple[int, int]]]:
        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=source,
            return_assistant_tokens_mask=marked,
            **{**special, **names},
        )
        return texts[0], [(int(a), int(b)) for a, b in spans[0]] if marked and spans else []

    return render


class _ChatTemplate:
    """Render messages and find every assistant turn in the text.

    Spans come from the template's ``{% generation %}`` marks where it has them. Else turn i begins
    where ``render(messages[:i], add_generation_prompt)`` ends and ends where
    ``render(messages[:i + 1])`` ends; both must be prefixes of the whole. Where the end is not
    (templates that rewrite earlier turns), the turn ends with the EOS after its content.
    """

    def __init__(self, render: _Render, source: str, eos_texts: list[str]) -> None:
        self._render, self._marked = render, bool(_GENERATION.search(source))
        self._eos_texts = eos_texts

    def __call__(self, example: Example) -> Rendered:
        if example.kind == "text":
            return _bare(example)
        messages, extras = example.messages, {**example.extras}
        full, spans = self._text(messages, extras)
        if self._marked and spans:
            return Rendered(full, [(a, self._closing(full, b)) for a, b in spans], own_bos=True)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                start = self._start(messages, index, full, extras)
                spans.append((start, self._end(messages, index, full, start, extras)))
        return Rendered(full, spans, own_bos=True)

    def _text(
        self, messages: list[dict[str, Any]], extras: dict[str, Any], prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            return self._render(messages, add_generation_prompt=prompt, **extras)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise SlimError(
                f"the chat template refuses this row: {' '.join(str(error).split())[:200]}",
                "mend the row, or choose data.template=chatml, alpaca or plain",
            ) from error

    def _start(
        self, messages: list[dict[str, Any]], index: int, full: str, extras: dict[str, Any]
    ) -> int:
        if index == 0:
            at = full.find(messages[0]["content"].strip())
            if at >= 0:
                return at
        for prompt in (True, False):
            before, _ = self._text(messages[:index], extras, prompt)
            if full.startswith(before):
                return len(before)
        raise self._unstable(index)

    def _end(
        self, messages: list[dict[str, Any]], index: int, full: str, start: int, extras: Any
    ) -> int:
        if index == len(messages) - 1:
            return len(full)
        through, _ = self._text(messages[: index + 1], extras)
        if full.startswith(through):
            return len(through)
        content = messages[index]["content"].strip()
        at = full.find(content, start)
        ends = [full.find(eos, at + len(content)) + len(eos) for eos in self._eos_texts
                if at >= 0 and full.find(eos, at + len(content)) >= 0]  # fmt: skip
        if not ends:
            raise self._unstable(index)
        return self._spaces(full, min(ends))

    def _closing(self, full: str, end: int) -> int:
        """Move the end of a marked span over the EOS that follows it."""
        for eos in self._eos_texts:
            if full.startswith(eos, end):
                return self._spaces(full, end + len(eos))
        return end

    @staticmethod
    def _spaces(full: str, end: int) -> int:
        match = re.compile(r"\n*").match(full, end)
        return match.end() if match else end

    @staticmethod
    def _unstable(index: int) -> SlimError:
        return SlimError(
            f"the chat template rewrites what stands before turn {index + 1}, "
            "so the answer cannot be told from the prompt",
            "use a template with {% generation %} marks, or data.template=chatml",
        )


def _custom(setting: str, tokenizer: Any) -> Template:
    """Load a Jinja file: sandboxed, and strict about names."""
    path = Path(setting).expanduser()
    if not path.is_file():
        raise SlimError(
            f"data.template={setting!r} is no template and no file", did_you_mean(setting, NAMES)
        )
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SlimError(f"the template {path} cannot be read as UTF-8: {error}") from error
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = _raise
    marked = bool(_GENERATION.search(source))
    bare = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)
    try:
        tree = environment.parse(bare)
        compiled = environment.from_string(bare)
    except TemplateSyntaxError as error:
        raise SlimError(f"{path.name}, line {error.lineno}: {error.message}") from error
    used = meta.find_undeclared_variables(tree)
    for name in sorted(used - _VARIABLES):
        at = [n.lineno for n in tree.find_all(nodes.Name) if n.name == name]
        raise SlimError(
            f"{path.name}, line {min(at, default=1)}: undefined variable {name!r}",
            did_you_mean(name, _VARIABLES),
        )
    special = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token or ""}
    key = hash_bytes(f"jinja 1 {special} {source}".encode())

    def render(messages: list[dict[str, Any]], **names: Any) -> tuple[str, list[tuple[int, int]]]:
        return compiled.render(messages=messages, **{"tools": None, **special, **names}), []

    chat = _ChatTemplate(
        _hub_render(source, special) if marked else render,
        source,
        _eos_texts(tokenizer),
    )

    def row(example: Example) -> Rendered:
        whole = chat(example) if "messages" in used and example.kind != "text" else _by_fields(
            example, render)  # fmt: skip
        bos = special["bos_token"]
        return Rendered(whole.text, whole.spans, own_bos=bool(bos) and whole.text.startswith(bos))

    return Template(path.name, key, row)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _by_fields(example: Example, render: _Render) -> Rendered:
    """Render a template over named fields; the answer is where a marker in its place comes out."""
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
    before, found, _ = marked.partition(_MARKER)
    if not found or not full.startswith(before):
        raise SlimError(
            "the answer does not come out of the template where 'output' or 'completion' stands"
        )
    return Rendered(full, [(len(before), len(full))])

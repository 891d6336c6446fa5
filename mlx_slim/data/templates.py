"""How a model reads a row: the text, and which characters of it are answers.

Invariant: ``render`` gives the whole text once, with the character spans that the model is to learn
(each answer and what closes it); the tokenizer sees exactly this text. The chat template is the
model's own, byte for byte. Try it: ``mlx-slim data preview smollm2-lora data.template=alpaca``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_slim.artifacts import hash_bytes
from mlx_slim.data.chat_render import none_default
from mlx_slim.data.chat_template import ChatTemplate, eos_texts, left_out, renderer
from mlx_slim.data.formats import Example
from mlx_slim.data.jinja_file import read_jinja
from mlx_slim.data.rendered import Rendered, join_pieces
from mlx_slim.errors import SlimError, did_you_mean

__all__ = ["NAMES", "Rendered", "Template", "load_template"]

NAMES = ("auto", "model", "alpaca", "plain", "chatml")
_DEFAULT, _TOOLS = "default", "tool_use"  # of several named templates, as transformers names them

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
class Template:
    """A way to render rows.

    Attributes:
        name: The recipe's setting, resolved (``model``, ``alpaca``, …).
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
            chat template though the setting is ``model``.
    """
    eos = tokenizer.eos_token or ""
    chat = getattr(tokenizer, "chat_template", None)
    named: dict[str, Callable[[Example], Rendered]] = {
        "alpaca": lambda example: _built_in("alpaca", example, _alpaca(example, eos)),
        "plain": lambda example: _built_in("plain", example, _plain(example, eos)),
        "chatml": lambda example: _built_in("chatml", example, _chatml(example)),
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
        return _model(chat, tokenizer)
    path = Path(setting).expanduser()
    if not path.is_file():
        raise SlimError(
            f"data.template={setting!r} is neither a template nor a file",
            did_you_mean(setting, NAMES),
        )
    content, render = read_jinja(path, tokenizer)
    return Template(path.name, hash_bytes(f"jinja 2 {content}".encode()), render)


def _model(chat: str | dict[str, str], tokenizer: Any) -> Template:
    """Return the model's chat template: of several the one for tools, where a row has these."""
    sources = chat if isinstance(chat, dict) else {_DEFAULT: chat}
    if _DEFAULT not in sources:
        raise SlimError(
            none_default(sources),
            "name a file with the one you mean: data.template=FILE, or use alpaca, plain or chatml",
        )
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    used = {name: sources[name] for name in (_DEFAULT, _TOOLS) if name in sources}
    renders = {
        name: ChatTemplate(renderer(source, special), source, eos_texts(tokenizer))
        for name, source in used.items()
    }

    def render(example: Example) -> Rendered:
        name = _TOOLS if _TOOLS in renders and _has_tools(example) else _DEFAULT
        return _bare(example) if example.kind == "text" else renders[name](example)

    name = "model" if len(used) == 1 else f"model ({', '.join(used)})"
    return Template(name, hash_bytes(f"model 2 {special} {used}".encode()), render)


def _has_tools(example: Example) -> bool:
    calls = any(message.get("tool_calls") for message in example.messages)
    return calls or bool(example.extras.get("tools"))


# ---------------------------------------------------------------------- built-in templates


def _built_in(name: str, example: Example, rendered: Rendered) -> Rendered:
    """Refuse tool calls, which these templates do not write."""
    return replace(rendered, notes=left_out(example, f"the template {name}"))


def _bare(example: Example) -> Rendered:
    return join_pieces([(example.fields["text"], 1.0)])


def _closed(example: Example, index: int, eos: str) -> str:
    """The answer and its EOS; the last answer's EOS is left to the tokenizer's own id."""
    content = example.messages[index]["content"]
    return content if index == len(example.messages) - 1 else content + eos


def _alpaca(example: Example, eos: str) -> Rendered:
    if example.kind == "text":
        return _bare(example)
    pieces: list[tuple[str, float | None]] = []
    input_text = example.fields.get("input", "")
    preamble = _ALPACA_INPUT if input_text else _ALPACA_ALONE
    for index, message in enumerate(example.messages):
        gap = "\n\n" if pieces else ""
        if message["role"] in ("system", "developer"):
            preamble = message["content"].rstrip() + "\n\n"
            continue
        if message["role"] == "assistant":
            answer = _closed(example, index, eos), example.turn_weights[index]
            pieces += [(f"{gap}### Response:\n", None), answer]
            continue
        text = example.fields["instruction"] if example.kind == "alpaca" else message["content"]
        block = f"### Instruction:\n{text}" + (
            f"\n\n### Input:\n{input_text}" if input_text else ""
        )
        pieces.append((gap + preamble + block, None))
        preamble = ""
    return join_pieces(pieces)


def _plain(example: Example, eos: str) -> Rendered:
    if example.kind == "text":
        return _bare(example)
    if example.kind == "completions":
        system = example.fields["system"]
        prompt = f"{system}\n\n{example.fields['prompt']}" if system else example.fields["prompt"]
        return join_pieces([(prompt, None), (example.fields["completion"], 1.0)])
    pieces: list[tuple[str, float | None]] = []
    for index, message in enumerate(example.messages):
        if message["role"] == "assistant":
            pieces.append((_closed(example, index, eos), example.turn_weights[index]))
        else:
            pieces.append((("\n" if pieces else "") + message["content"] + "\n", None))
    return join_pieces(pieces)


def _chatml(example: Example) -> Rendered:
    if example.kind == "text":
        return _bare(example)
    pieces: list[tuple[str, float | None]] = []
    for message, weight in zip(example.messages, example.turn_weights, strict=True):
        answer = message["role"] == "assistant"
        pieces.append((f"<|im_start|>{message['role']}\n", None))
        pieces.append((f"{message['content']}<|im_end|>\n", weight if answer else None))
    return join_pieces(pieces)

"""Masks of conversations under templates of every kind, against a plain slow reference."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mlx_slim.data.formats import Example
from mlx_slim.data.templates import load_template
from tests.data.conftest import load_bytes
from tests.support.chat_templates import PIECES, TEMPLATES

WORDS = ["AI", "Yes", "You help.", "Hi", "I am a bot: assistant", "<b>x</b>", "a\n\nb", "4", "日本",
         "assistant\n", "user", "<|im_start|>assistant\n", " spaced ", "{{ x }}", "."]  # fmt: skip
NO_TOOLS = ("cut thoughts", "folded", "headers", "renamed", "script", "marked")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("templates")
    return {
        name: load_bytes(folder / name.replace(" ", "-"), chat_template=source)
        for name, source in TEMPLATES.items()
    }


def conversation(rng: random.Random, name: str) -> list[dict[str, Any]]:
    """Return random turns; answers repeat what other turns say."""
    said = [rng.choice(WORDS) for _ in range(3)]

    def text() -> str:
        return rng.choice([*said, rng.choice(WORDS)])

    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": f"Say {text()} or {text()}, no {text()}"})
    if name != "folded" and rng.random() < 0.3:
        messages.append({"role": "assistant", "content": text()})
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": text()})
        answer: dict[str, Any] = {"role": "assistant", "content": text()}
        thinks = rng.random()
        if "think" in name and thinks < 0.3:
            answer["content"] = f"<think>\n{text()}\n</think>\n\n{answer['content']}"
        elif "thinking" in name and thinks < 0.5:
            answer["reasoning_content"] = text()
        if name not in NO_TOOLS and rng.random() < 0.4:
            count = rng.randint(1, 2)
            answer["content"] = rng.choice(["", answer["content"]])
            answer["tool_calls"] = [
                {"type": "function", "function": {"name": "look", "arguments": arguments}}
                for arguments in rng.sample([{}, {"at": text()}, {"n": 3, "q": text()}], count)
            ]
            messages += [answer, *({"role": "tool", "content": text()} for _ in range(count))]
            answer = {"role": "assistant", "content": text()}
        messages.append(answer)
    return messages


def spans_of(pieces: list[tuple[str, int | None]]) -> tuple[str, list[tuple[str, float]]]:
    text, spans = "", []
    for piece, turn in pieces:
        if turn is not None:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, spans


@pytest.mark.parametrize("name", TEMPLATES)
def test_spans_are_those_of_a_plain_reference(tokenizers, name):
    template = load_template("model", tokenizers[name])
    for seed in range(120):
        messages = conversation(random.Random(seed), name)
        rendered = template.render(Example("chat", messages))
        text, spans = spans_of(PIECES[name](messages))
        assert rendered.text == text, (seed, messages)
        found = [text[a:b] for a, b in rendered.spans]
        assert found == [text[a:b] for a, b in spans], (seed, messages)
        assert rendered.spans == spans, (seed, messages)

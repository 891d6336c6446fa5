"""Tokenizers of different vocabularies, learned from a few words in a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.support.tiny import tiny_model

# What closes an answer is one token, so that the last token is what TRL leaves out.
TAGS = (
    "{% for message in messages %}<turn>{{ message['role'] }}\n{{ message['content'] }}<end>"
    "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
BRACKETS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] }}"
    "</s>{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}"
)
_ROWS = [
    ("Say alpha.", "alpha beta gamma"),
    ("What about größe?", "Größe naïve 🙂 façade, gamma-delta!"),
    ("And then?", "one two  three\nfour five"),
    ("Last", "beta betabeta gammagamma delta"),
    ("Short", "hi"),
]


def write_conversations(path: Path, copies: int = 1) -> Path:
    """Write rows whose answers have words, accents, an emoji, spaces and a new line."""
    rows = [
        {"prompt": f"{prompt} {number or ''}".strip(), "completion": answer}
        for number in range(copies)
        for prompt, answer in _ROWS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def bpe_tokenizer(folder: Path, words: list[str], size: int, template: str, eos: str) -> None:
    """Write a byte-level BPE tokenizer of ``size`` tokens, learned from ``words``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [eos, "<turn>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "pad_token": eos,
        "model_max_length": 512,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def student_of_words(folder: Path, **changes: Any) -> Path:
    """Write a tiny model that knows the first letters of the words as tokens."""
    tiny_model(folder, vocab_size=330, **{"seed": 3, **changes})
    words = ["alp alp alp gam gam fou fou del del ïv ïv", " be be be two two", "Gr Gr öß öß"]
    bpe_tokenizer(folder, words * 4, 320, TAGS, "<end>")
    return folder


def teacher_of_words(folder: Path, **changes: Any) -> Path:
    """Write a tiny model that knows other pieces of the words, and more of them."""
    tiny_model(folder, vocab_size=410, **{"seed": 7, "num_hidden_layers": 2, **changes})
    words = [
        "beta gamma delta one two three",
        " alpha alpha",
        "lpha eta amma Größe ße açade",
        "🙂 🙂",
    ]
    bpe_tokenizer(folder, words * 4, 400, BRACKETS, "</s>")
    return folder

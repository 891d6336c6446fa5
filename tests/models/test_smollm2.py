"""The imported real model against what PyTorch computed from the same GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.models.load import load
from mlx_slim.models.quantized import densify


def _rows(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def loaded(smollm2: Path) -> Any:
    loaded = load(smollm2, dtype=mx.float32)
    densify(loaded.model)  # the same float32 weights, unpacked once and not for every question
    return loaded


def test_chat_template_gives_the_reference_token_ids(
    loaded: Any, data_mirror: Any, references: Any
) -> None:
    reference = json.loads(
        (references / "alpaca_loss_and_gradients.json").read_text(encoding="utf-8")
    )
    rows = _rows(data_mirror / "alpaca" / "train.jsonl")
    for expected in reference["rows"]:
        row = rows[expected["row"]]
        user = row["instruction"] + (f"\n{row['input']}" if row["input"] else "")
        messages = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": row["output"]},
        ]
        assert loaded.tokenizer.apply_chat_template(messages) == expected["ids"]


def test_tokenizer_from_gguf_round_trips(loaded: Any) -> None:
    text = "  Hello   world\n\n\t12345, 3.14: naïve café — 'tis I'LL 日本語 🎉\r\n x <|im_end|>"
    ids = loaded.tokenizer.encode(text)
    assert loaded.tokenizer.decode(ids) == text
    assert ids[-1] == loaded.tokenizer.eos_token_id
    assert loaded.tokenizer.eos_token_ids == {2}
    digits = loaded.tokenizer.convert_ids_to_tokens(loaded.tokenizer.encode("12345"))
    assert digits == list("12345")

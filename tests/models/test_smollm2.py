"""The imported real model against what PyTorch computed from the same GGUF file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_slim.models.load import load
from mlx_slim.models.quantized import densify

SAMPLE = 4
Request = tuple[str, str]


def _rows(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _clean(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag(data: Path) -> Iterator[list[Request]]:
    for row in _rows(data / "hellaswag" / "validation.jsonl"):
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        yield [(_clean(context), f" {_clean(ending)}") for ending in row["endings"]]


def arc_easy(data: Path) -> Iterator[list[Request]]:
    for row in _rows(data / "arc_easy" / "test.jsonl"):
        context = f"Question: {row['question']}\nAnswer:"
        yield [(context, f" {choice}") for choice in row["choices"]["text"]]


def us_foreign_policy(data: Path) -> Iterator[list[Request]]:
    def ask(row: dict) -> str:
        options = zip("ABCD", row["choices"], strict=True)
        listed = "".join(f"{letter}. {choice}\n" for letter, choice in options)
        return f"{row['question'].strip()}\n{listed}Answer:"

    subject = "us_foreign_policy"
    shots = [r for r in _rows(data / "mmlu" / "dev.jsonl") if r["subject"] == subject]
    head = "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
    for shot in shots:
        head += f"{ask(shot)} {'ABCD'[shot['answer']]}\n\n"
    for row in _rows(data / "mmlu" / "test.jsonl"):
        if row["subject"] == subject:
            yield [(head + ask(row), f" {letter}") for letter in "ABCD"]


TASKS = {
    "hellaswag_0shot": hellaswag,
    "arc_easy_0shot": arc_easy,
    "mmlu_us_foreign_policy_5shot": us_foreign_policy,
}


def score(model: nn.Module, tokenizer, requests: list[Request]) -> list[float]:
    """Log-likelihood of each continuation, one whole sequence at a time: slow and plain."""
    scores: list[float] = []
    known: dict[tuple[int, ...], mx.array] = {}  # sequences that differ in the last token only
    for context, continuation in requests:
        ids = tokenizer.encode(context + continuation)
        start = len(tokenizer.encode(context))
        key = tuple(ids[:-1])
        if key not in known:
            logits = model(mx.array([ids[:-1]]))[0, start - 1 :].astype(mx.float32)
            known[key] = nn.log_softmax(logits)
        rows = known[key]
        picked = mx.take_along_axis(rows, mx.array(ids[start:])[:, None], axis=-1)
        scores.append(float(picked.sum()))
    return scores


@pytest.fixture(scope="module")
def loaded(smollm2):
    loaded = load(smollm2, dtype=mx.float32)
    densify(loaded.model)  # the same float32 weights, unpacked once and not for every question
    return loaded


@pytest.mark.parametrize("task", TASKS)
def test_loglikelihoods_match_the_reference_harness(loaded, data_mirror, references, task):
    reference = json.loads((references / f"{task}.json").read_text(encoding="utf-8"))
    questions = TASKS[task](data_mirror)
    for index, (sample, requests) in enumerate(zip(reference["samples"], questions, strict=False)):
        if index == SAMPLE:
            break
        assert sample["doc_id"] == index
        found = score(loaded.model, loaded.tokenizer, requests)
        assert found == pytest.approx(sample["loglikelihoods"], abs=0.01)


def test_chat_template_gives_the_reference_token_ids(loaded, data_mirror, references):
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


def test_tokenizer_from_gguf_round_trips(loaded):
    text = "  Hello   world\n\n\t12345, 3.14: naïve café — 'tis I'LL 日本語 🎉\r\n x <|im_end|>"
    ids = loaded.tokenizer.encode(text)
    assert loaded.tokenizer.decode(ids) == text
    assert ids[-1] == loaded.tokenizer.eos_token_id
    assert loaded.tokenizer.eos_token_ids == {2}
    digits = loaded.tokenizer.convert_ids_to_tokens(loaded.tokenizer.encode("12345"))
    assert digits == list("12345")

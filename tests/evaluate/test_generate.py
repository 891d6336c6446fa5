"""Batched generation against the slowest possible reference: one full forward pass a token."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm import load

from mlx_slim.errors import SlimError
from mlx_slim.evaluate.generate import Tally, generate_batch


def _reference(model, prompt: list[int], max_tokens: int, stops: set[int]) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + max_tokens:
        token = int(mx.argmax(model(mx.array([ids]))[0, -1]).item())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


def _prompts(tokenizer, shared: str) -> list[list[int]]:
    words = ["a", "pay the rent", "is this a much longer question than others?", "xyz 12", "q"]
    return [tokenizer.encode(shared + word, add_special_tokens=False) for word in words]


@pytest.mark.parametrize("architecture", ["llama", "phi"])
@pytest.mark.parametrize("shared", ["", "the same beginning: "])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_equals_one_at_a_time(tiny, architecture, shared, batch_size):
    model, tokenizer = load(str(tiny(architecture)))
    prompts = _prompts(tokenizer, shared)
    first = _reference(model, prompts[1], 12, set())
    stops = {first[7]}  # a token that does come up
    answers = generate_batch(model, tokenizer, prompts, 12, stops, batch_size=batch_size)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = _reference(model, prompt, 12, stops)
        assert answer.ids == expected
        assert answer.text == tokenizer.decode(expected)
        assert answer.stop_reason == ("length" if len(expected) == 12 else "eos")
    assert answers[1].stop_reason == "eos"


def test_stops_at_the_tokenizers_own_end_by_default(tiny):
    model, tokenizer = load(str(tiny()))
    prompts = _prompts(tokenizer, "")
    tokenizer.eos_token_ids = {_reference(model, prompts[0], 1, set())[0]}
    assert generate_batch(model, tokenizer, prompts[:1], 5)[0].ids == []


def test_identical_prompts_share_all_but_their_last_token(tiny):
    model, tokenizer = load(str(tiny()))
    prompt = tokenizer.encode("twice the same prompt", add_special_tokens=False)
    one, two = generate_batch(model, tokenizer, [prompt, prompt], 6, ())
    assert one == two
    assert one.ids == _reference(model, prompt, 6, set())


def test_no_prompts_and_empty_prompt(tiny):
    model, tokenizer = load(str(tiny()))
    assert generate_batch(model, tokenizer, [], 5) == []
    with pytest.raises(SlimError, match="prompt 1 has no tokens"):
        generate_batch(model, tokenizer, [[5], []], 5)


def _cut(text: str, stops: tuple[str, ...]) -> str:
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


@pytest.mark.parametrize("batch_size", [2, 64])
def test_stop_strings_end_an_answer_wherever_tokens_cut_them(tiny, batch_size):
    model, tokenizer = load(str(tiny()))
    prompts = _prompts(tokenizer, "the same beginning: ")
    plain = generate_batch(model, tokenizer, prompts, 24, ())
    text = plain[1].text
    stops = (text[6:9], "never comes")  # several byte tokens, in the middle
    tally = Tally()
    answers = generate_batch(
        model, tokenizer, prompts, 24, (), stops=stops, batch_size=batch_size, tally=tally
    )
    assert answers[1].stop_reason == "until"
    for answer, whole in zip(answers, plain, strict=True):
        assert answer.text == _cut(whole.text, stops)
        stopped = any(stop in whole.text for stop in stops)
        assert answer.stop_reason == ("until" if stopped else "length")
    assert tally.computed >= tally.minimum > 0
    assert len(answers[1].ids) < 24  # it left the batch


def test_the_tally_counts_what_the_model_computed(tiny):
    model, tokenizer = load(str(tiny()))
    prompts = [[5, 6, 7, 8], [5, 6, 7, 9]]
    tally = Tally()
    generate_batch(model, tokenizer, prompts, 3, (), tally=tally)
    assert tally.minimum == 5 + 2 * 2  # the prompts' five distinct prefixes, two more tokens each
    assert tally.computed >= tally.minimum

"""Batched generation against the slowest possible reference: one full forward pass a token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import BatchKVCache

from mlx_slim.errors import SlimError
from mlx_slim.evaluation.scoring import generate
from mlx_slim.evaluation.scoring.answer_cache import (
    footprint,
    joins,
    supports_shared_prefix,
)
from mlx_slim.evaluation.scoring.footprint import STEP
from mlx_slim.evaluation.scoring.generate import GenerationCounts, generate_batch
from mlx_slim.models.kv_cache import cache_format, quantize_cache
from mlx_slim.models.load import load
from mlx_slim.runtime import to_float
from tests.support.memory import reset_peak
from tests.support.stock import stock_load
from tests.support.tiny import MIXTURES, fixed_answer_model, tiny_model

# Models that mlx-lm batches otherwise: masks of another shape, states that padding would enter.
OTHERS = {
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "mamba": {
        "model_type": "mamba",
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 8,
        "tie_word_embeddings": True,
    },
    "gpt_bigcode": {
        "model_type": "gpt_bigcode",
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
        "n_inner": 128,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    "qwen3_next": {
        **{k: v for k, v in MIXTURES["qwen3_moe"].items() if k != "mlp_only_layers"},
        "model_type": "qwen3_next",
        "mlp_only_layers": [],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 64,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 2,
    },
}


def _reference(model: Any, prompt: list[int], max_tokens: int, stops: set[int]) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + max_tokens:
        token = int(to_float(mx.argmax(model(mx.array([ids]))[0, -1])))
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


def _prompts(tokenizer: Any, shared: str) -> list[list[int]]:
    words = ["a", "pay the rent", "is this a much longer question than others?", "xyz 12", "q"]
    return [tokenizer.encode(shared + word, add_special_tokens=False) for word in words]


@pytest.mark.parametrize("architecture", ["llama", "phi"])
@pytest.mark.parametrize("shared", ["", "the same beginning: "])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_equals_one_at_a_time(
    tiny: Callable[..., Path], architecture: str, shared: str, batch_size: int
) -> None:
    model, tokenizer = stock_load(str(tiny(architecture)))
    prompts = _prompts(tokenizer, shared)
    first = _reference(model, prompts[1], 12, set())
    stops = {first[7]}  # a token that does come up
    answers = generate_batch(model, tokenizer, prompts, 12, stops, batch_size=batch_size)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = _reference(model, prompt, 12, stops)
        assert answer.ids == expected
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.stop_reason == ("length" if len(expected) == 12 else "eos")
    assert answers[1].stop_reason == "eos"


@pytest.mark.parametrize("shared", ["", "the same beginning: "])
@pytest.mark.parametrize("batch_size", [1, 64])
@pytest.mark.parametrize("architecture", ["llama", "qwen3_next"])
def test_rounded_keys_and_values_answer_as_a_quantized_cache(
    tmp_path: Path, architecture: str, shared: str, batch_size: int
) -> None:
    changes = {**OTHERS.get(architecture, {}), "head_dim": 32}
    loaded = load(tiny_model(tmp_path / "m", "llama", **changes), dtype=mx.float32)
    prompts = _prompts(loaded.tokenizer, shared)[:3]
    format = cache_format(loaded.model, 4)
    plain, rounded = (
        generate_batch(
            loaded.model, loaded.tokenizer, prompts, 8, (), batch_size=batch_size, kv_format=kv
        )
        for kv in (None, format)
    )
    quantize_cache(loaded.model, 4)
    expected = [
        [token for token, _ in generate_step(mx.array(prompt), loaded.model, max_tokens=8)]
        for prompt in prompts
    ]
    assert [answer.ids for answer in rounded] == expected
    assert [answer.ids for answer in plain] != expected


def test_stops_at_the_tokenizers_eos_by_default(tiny: Callable[..., Path]) -> None:
    model, tokenizer = stock_load(str(tiny()))
    prompts = _prompts(tokenizer, "")
    tokenizer.eos_token_ids = {_reference(model, prompts[0], 1, set())[0]}
    assert generate_batch(model, tokenizer, prompts[:1], 5)[0].ids == []


def test_identical_prompts_have_all_but_their_last_token_in_common(
    tiny: Callable[..., Path],
) -> None:
    model, tokenizer = stock_load(str(tiny()))
    prompt = tokenizer.encode("twice the same prompt", add_special_tokens=False)
    one, two = generate_batch(model, tokenizer, [prompt, prompt], 6, ())
    assert one == two
    assert one.ids == _reference(model, prompt, 6, set())


def test_no_prompts_and_empty_prompt(tiny: Callable[..., Path]) -> None:
    model, tokenizer = stock_load(str(tiny()))
    assert generate_batch(model, tokenizer, [], 5) == []
    with pytest.raises(SlimError, match="prompt 1 has no tokens"):
        generate_batch(model, tokenizer, [[5], []], 5)


def _cut(text: str, stops: tuple[str, ...]) -> str:
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


@pytest.mark.parametrize("batch_size", [2, 64])
def test_stop_strings_end_an_answer_wherever_tokens_cut_them(
    tiny: Callable[..., Path], batch_size: int
) -> None:
    model, tokenizer = stock_load(str(tiny()))
    prompts = _prompts(tokenizer, "the same beginning: ")
    plain = generate_batch(model, tokenizer, prompts, 24, ())
    text = plain[1].text
    stops = (text[6:9], "never comes")  # several byte tokens, in the middle
    tally = GenerationCounts()
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


def test_the_tally_counts_what_the_model_computed(tiny: Callable[..., Path]) -> None:
    model, tokenizer = stock_load(str(tiny()))
    prompts = [[5, 6, 7, 8], [5, 6, 7, 9]]
    tally = GenerationCounts()
    generate_batch(model, tokenizer, prompts, 3, (), tally=tally)
    assert tally.minimum == 5 + 2 * 2  # the prompts' five distinct prefixes, two more tokens each
    assert tally.computed >= tally.minimum


def _many(tokenizer: Any) -> list[list[int]]:
    return [tokenizer.encode("b" * 300 + f" number {i}") for i in range(24)]


@pytest.mark.parametrize("architecture", ["llama", "phi"])
@pytest.mark.parametrize("budget", [6e6, 2e7])
def test_memory_stays_within_the_budget_and_answers_are_the_same(
    tiny: Callable[..., Path], architecture: str, budget: float
) -> None:
    model, tokenizer = stock_load(str(tiny(architecture)))
    prompts = _many(tokenizer)
    expected = [_reference(model, prompts[i], 4, set()) for i in (0, 11, 23)]
    before = reset_peak()
    answers = generate_batch(model, tokenizer, prompts, 4, (), cache_bytes=int(budget))
    assert mx.get_peak_memory() - before <= budget
    assert [answers[i].ids for i in (0, 11, 23)] == expected


def _unlike(tokenizer: Any) -> list[list[int]]:
    lengths = (1, 60, 3, 7, 33, 2)
    return [tokenizer.encode("of one beginning " + "ab" * n + str(n)) for n in lengths]


@pytest.mark.parametrize("budget", [1, 10**9])
@pytest.mark.parametrize("name", list(OTHERS))
def test_prompts_beside_it_change_no_answer(tmp_path: Path, name: Any, budget: Any) -> None:
    folder = tiny_model(tmp_path / "m", "llama", **OTHERS[name])
    loaded = load(folder, dtype=mx.float32)
    prompts = _unlike(loaded.tokenizer)
    answers = generate_batch(
        loaded.model, loaded.tokenizer, prompts, 5, (), cache_bytes=budget, batch_size=8
    )
    expected = [_reference(loaded.model, prompt, 5, set()) for prompt in prompts]
    assert [answer.ids for answer in answers] == expected
    assert joins(loaded.model) == (name not in ("mamba", "gpt_bigcode"))


def test_the_prefix_is_held_once(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = stock_load(str(tiny("llama-mha")))
    prompts = _many(tokenizer)
    peaks = []
    for shared in (True, False):
        monkeypatch.setattr(generate, "supports_shared_prefix", lambda model, shared=shared: shared)
        before = reset_peak()
        answers = generate_batch(model, tokenizer, prompts, 3, ())
        peaks.append(mx.get_peak_memory() - before)
        assert answers[5].ids == _reference(model, prompts[5], 3, set())
    prefix = footprint(model).cache_bytes(300)
    # Fifteen copies less; what else is in memory at the highest moment differs from run to run.
    assert peaks[0] < peaks[1] - 8 * prefix


def test_windows_are_copied_and_bounded(tmp_path: Path) -> None:
    changes = {"sliding_window": 64, "sliding_window_pattern": 2, "head_dim": 16}
    changes |= {"query_pre_attn_scalar": 16, "rope_local_base_freq": 1e4}
    folder = tiny_model(tmp_path / "g", "llama", **{**changes, "model_type": "gemma3_text"})
    model, tokenizer = stock_load(str(folder))
    assert not supports_shared_prefix(model)
    prompts = _many(tokenizer)[:8]
    one, many = (generate_batch(model, tokenizer, prompts, 4, (), batch_size=n) for n in (1, 8))
    assert one == many
    memory = footprint(model)
    assert BatchKVCache.step == STEP
    assert {window for _, window in memory.layers} == {64, None}


def test_mlx_lm_attends_as_before_afterwards(tiny: Callable[..., Path]) -> None:
    from mlx_lm.models import base, llama

    model, tokenizer = stock_load(str(tiny()))
    assert supports_shared_prefix(model)
    generate_batch(model, tokenizer, _prompts(tokenizer, "the same beginning: "), 2, ())
    attention = base.scaled_dot_product_attention
    assert llama.scaled_dot_product_attention is attention  # pyright: ignore[reportPrivateImportUsage]


def test_special_tokens_leave_the_text_and_still_stop_it(tmp_path: Path) -> None:
    folder = fixed_answer_model(tmp_path / "m", "ab")
    model, tokenizer = stock_load(str(folder))
    prompt, special = tokenizer.encode("x"), tokenizer.convert_tokens_to_ids("<|im_start|>")
    (plain,) = generate_batch(model, tokenizer, [prompt], 3, ())
    model.lm_head.weight[special] = 2 * mx.eye(264, 288)[prompt[0]]  # first of all a special token
    (answer,) = generate_batch(model, tokenizer, [prompt], 3, ())
    assert answer.ids[0] == special
    assert answer.text == tokenizer.decode(answer.ids, skip_special_tokens=True)
    assert "im_start" in tokenizer.decode(answer.ids) and "im_start" not in answer.text
    (stopped,) = generate_batch(model, tokenizer, [prompt], 3, (), stops=["<|im_start|>"])
    assert (stopped.text, stopped.stop_reason) == ("", "until")
    assert plain.text.startswith("ab")

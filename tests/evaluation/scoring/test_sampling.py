"""Sampled answers: the same in any batch, of the right distribution, with its logarithms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.adapters.inject import inject
from mlx_slim.config.adapter import AdapterConfig
from mlx_slim.evaluation.scoring.generate import Generation, GenerationCounts, generate_batch
from mlx_slim.evaluation.scoring.sampling import AnswerSampler, Sampling
from mlx_slim.models.load import Loaded, load
from mlx_slim.models.logits import token_nll
from tests.support.tiny import MIXTURES, tiny_model

WORDS = ["a", "pay the rent", "is this a much longer question than others?", "xyz 12", "q"]
SAMPLING = Sampling(temperature=0.8, top_p=0.95)


def _loaded(folder: Path) -> Loaded:
    return load(folder, dtype=mx.float32)


def _prompts(loaded: Loaded, shared: str) -> list[list[int]]:
    return [loaded.tokenizer.encode(shared + word, add_special_tokens=False) for word in WORDS]


def _sampled(loaded: Loaded, prompts: Any, keys: Any, **options: Any) -> list[Generation]:
    options = {"stop_ids": (), "sampling": SAMPLING, "keys": keys, **options}
    return generate_batch(loaded.model, loaded.tokenizer, prompts, 10, **options)


@pytest.mark.parametrize("shared", ["", "the same beginning: "])
@pytest.mark.parametrize("repeats", [1, 3])
def test_an_answer_is_the_same_in_any_batch(
    tiny: Callable[..., Path], shared: str, repeats: int
) -> None:
    loaded = _loaded(tiny())
    rows = [(row, n) for row in range(len(WORDS)) for n in range(repeats)]
    prompts = [_prompts(loaded, shared)[row] for row, _ in rows]
    keys = [(7, 2, row, n) for row, n in rows]
    one, three, sixteen = (
        [answer.ids for answer in _sampled(loaded, prompts, keys, batch_size=size)]
        for size in (1, 3, 16)
    )
    assert one == three == sixteen
    assert len({tuple(ids) for ids in one}) == len(rows)  # nor are two of them alike
    alone = [_sampled(loaded, [p], [k])[0].ids for p, k in zip(prompts, keys, strict=True)]
    assert alone == one
    last = _sampled(loaded, prompts[-2:], keys[-2:], batch_size=16)  # as after a kill
    assert [answer.ids for answer in last] == one[-2:]
    other = _sampled(loaded, prompts, [(8, *key[1:]) for key in keys], batch_size=16)
    assert [answer.ids for answer in other] != one


@pytest.mark.parametrize("architecture", ["qwen3_next", "gemma3_text"])
def test_so_it_is_with_recurrent_states_and_windows(tmp_path: Path, architecture: str) -> None:
    changes = {}
    if architecture == "qwen3_next":
        from tests.evaluation.scoring.test_generate import OTHERS

        changes = {**MIXTURES["qwen3_moe"], **OTHERS[architecture]}
    name = "llama" if changes else architecture
    loaded = _loaded(tiny_model(tmp_path / "m", name, **changes))
    prompts = [prompt for prompt in _prompts(loaded, "the start: ")[:3] for _ in range(2)]
    keys = [(0, 0, row) for row in range(6)]
    one, many = (
        [answer.ids for answer in _sampled(loaded, prompts, keys, batch_size=size)]
        for size in (1, 8)
    )
    assert one == many


def test_a_prompt_that_is_answered_several_times_is_computed_once(
    tiny: Callable[..., Path],
) -> None:
    loaded = _loaded(tiny())
    prompts = [prompt for prompt in _prompts(loaded, "the same beginning: ") for _ in range(4)]
    tally = GenerationCounts()
    _sampled(loaded, prompts, [(i,) for i in range(20)], batch_size=16, tally=tally)
    # Of each answer, the prompt's last token besides, and the one after its own last.
    assert tally.computed <= tally.minimum + 2 * len(prompts)
    assert tally.computed < sum(map(len, prompts)) + 10 * len(prompts)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("repeats", [1, 2])
def test_log_probabilities_are_those_that_a_trainer_computes(
    tiny: Callable[..., Path], temperature: float, repeats: int
) -> None:
    loaded = _loaded(tiny())
    prompts = [prompt for prompt in _prompts(loaded, "start: ") for _ in range(repeats)]
    answers = generate_batch(
        loaded.model, loaded.tokenizer, prompts, 12, set(range(20)), log_probs=True,
        sampling=Sampling(temperature, 0.9), keys=[(i,) for i in range(len(prompts))],
    )  # fmt: skip
    assert {answer.stop_reason for answer in answers} == {"eos", "length"}
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.log_probs is not None and len(answer.log_probs) == len(answer.drawn)
        assert (answer.stop_reason == "eos") == (len(answer.drawn) > len(answer.ids))
        logits = loaded.model(mx.array([[*prompt, *answer.drawn[:-1]]]))[0, len(prompt) - 1 :]
        expected = -token_nll(logits / temperature, mx.array(answer.drawn))
        assert np.abs(np.array(expected) - answer.log_probs).max() < 1e-5


def test_adapters_have_no_dropout_in_evaluation_mode(tiny: Callable[..., Path]) -> None:
    loaded = _loaded(tiny())
    inject(loaded.model, AdapterConfig(rank=4, dropout=0.5), dora=False)
    for _, module in loaded.model.named_modules():
        if "lora_b" in module:
            module["lora_b"] = 0.3 * mx.random.normal(module["lora_b"].shape)
    prompts, keys = _prompts(loaded, ""), [(i,) for i in range(5)]
    loaded.model.eval()
    one, again = (_sampled(loaded, prompts, keys) for _ in range(2))
    assert one == again
    loaded.model.train()
    assert _sampled(loaded, prompts, keys) != one  # dropout does take part there


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=2.0), Sampling(temperature=1.0, top_p=0.6)]
)
def test_tokens_come_as_often_as_they_are_likely(sampling: Sampling) -> None:
    logits = mx.log(mx.array([[0.05, 0.4, 0.0, 0.25, 0.2, 0.1]]))
    p = np.array([0.05, 0.4, 0.0, 0.25, 0.2, 0.1]) ** (1 / sampling.temperature)
    if sampling.top_p == 0.6:
        p[[0, 4, 5]] = 0
    sampler = AnswerSampler(sampling, (1, 2))
    count, draws = Counter(sampler(logits).item() for _ in range(4000)), 4000
    expected = p / p.sum()
    for token in range(6):
        spread = 4 * np.sqrt(expected[token] * (1 - expected[token]) / draws)
        assert abs(count[token] / draws - expected[token]) <= spread

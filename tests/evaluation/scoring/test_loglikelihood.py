"""The fast engine against the plain scorer: one sequence at a time, no cache, float64."""

from __future__ import annotations

import json
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache
from mlx_lm.utils import _get_classes

from mlx_slim.bench.model_case import build_case
from mlx_slim.evaluation.run import EvalOptions, evaluate
from mlx_slim.evaluation.scoring import loglikelihood
from mlx_slim.evaluation.scoring.loglikelihood import LoglikelihoodScorer
from mlx_slim.evaluation.scoring.plain import log_softmax, plain_score
from mlx_slim.evaluation.scoring.requests import Request
from mlx_slim.models.kv_cache import KVFormat, cache_format
from mlx_slim.models.load import load
from mlx_slim.models.quantized import densify
from mlx_slim.runtime import to_float
from tests.evaluation.scoring.test_generate import OTHERS
from tests.support.tiny import tiny_model

SHOTS = tuple(random.Random(5).randint(3, 200) for _ in range(40))


def _questions(seed: int = 0, questions: int = 9, root: tuple[int, ...] = ()) -> list[Request]:
    """Contexts of many lengths with choices of one and of several tokens."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randint(3, 200) for _ in range(draw.randint(low, high)))

    requests = []
    for number in range(questions):
        context = root + text(1, 40)
        endings = [text(1, 1) if number % 3 == 0 else text(1, 12) for _ in range(4)]
        if number % 4 == 1:
            endings[1] = endings[0] + text(1, 3)  # one choice begins with another
        requests += [Request(context + ending, len(context)) for ending in endings]
    return requests


def _differences(scores: Any, model: Any, requests: Any) -> list[str]:
    """Return the scores that differ from the plain scorer's by more than 1e-3 nats."""
    differences = []
    for index, (score, request) in enumerate(zip(scores, requests, strict=True)):
        expected, greedy = plain_score(model, request.ids, request.start)
        if abs(score.loglikelihood - expected) > 1e-3 or score.greedy != greedy:
            differences.append(f"request {index}: {score}, expected {expected} {greedy}")
    return differences


def _greedy_request(model: Any, context: tuple[int, ...], length: int) -> Request:
    ids = list(context)
    for _ in range(length):
        ids.append(int(to_float(mx.argmax(model(mx.array([ids]))[0, -1]))))
    return Request(tuple(ids), len(context))


@pytest.mark.parametrize("architecture", ["llama", "llama-mha", "llama-tied", "phi", "mistral"])
@pytest.mark.parametrize("batch_tokens", [24, 512])
@pytest.mark.parametrize("lists", [True, False])
def test_equals_the_plain_scorer(
    tiny: Callable[..., Path], architecture: str, batch_tokens: int, lists: bool
) -> None:
    model = load(tiny(architecture)).model
    requests = [*_questions(), _greedy_request(model, (7, 8, 9), 5)]
    scorer = LoglikelihoodScorer(model, batch_tokens=batch_tokens, lists=lists)
    assert scorer.notes == [] and scorer.lists == lists
    scores = scorer.score(requests)
    assert _differences(scores, model, requests) == []
    assert scores[-1].greedy
    assert scorer.tokens_computed >= scorer.tokens_minimum > 0


@pytest.mark.parametrize("architecture", ["llama", "phi"])
@pytest.mark.parametrize("lists", [True, False])
def test_a_shared_root_is_computed_once_and_changes_nothing(
    tiny: Callable[..., Path], architecture: str, lists: bool
) -> None:
    model = load(tiny(architecture)).model
    requests = _questions(root=SHOTS)
    scorer = LoglikelihoodScorer(model, batch_tokens=64, lists=lists)
    halves = [scorer.score(requests[:20], SHOTS), scorer.score(requests[20:], SHOTS)]
    assert _differences(halves[0] + halves[1], model, requests) == []
    once = scorer.tokens_minimum
    assert once == len(SHOTS) + sum(
        len(
            {
                request.inputs[:end]
                for request in part
                for end in range(41, 99)
                if end <= len(request.inputs)
            }
        )
        for part in (requests[:20], requests[20:])
    )
    fresh = LoglikelihoodScorer(model, batch_tokens=64, lists=lists)
    assert fresh.score(requests[20:], SHOTS) == halves[1]  # to the bit: whatever came before


def _over_codes(model: Any, request: Request, format: KVFormat) -> float:
    """Return the score of a request read token by token with mlx-lm's quantized cache."""
    caches = [
        QuantizedKVCache(format.group_size, format.bits) if isinstance(cache, KVCache) else cache
        for cache in make_prompt_cache(model)
    ]
    rows = [model(mx.array([[token]]), cache=caches)[0, 0] for token in request.inputs]
    logp_TV = log_softmax(np.array(mx.stack(rows)).astype(np.float64))
    return sum(logp_TV[i - 1, request.ids[i]] for i in range(request.start, len(request.ids)))


@pytest.mark.parametrize("architecture", ["llama", "qwen3_next"])  # the other cannot share prefixes
@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_keys_and_values_score_as_a_quantized_cache(
    tmp_path: Path, architecture: str, bits: int
) -> None:
    changes = OTHERS.get(architecture, {})
    model = load(tiny_model(tmp_path / "m", "llama", **{**changes, "head_dim": 32})).model
    format = cache_format(model, bits)
    root = SHOTS[:20]
    requests = [r for r in _questions(questions=3, root=root) if len(r.ids) < 50]
    plain = LoglikelihoodScorer(model).score(requests, root)
    scorer = LoglikelihoodScorer(model, batch_tokens=64, kv_format=format)
    assert scorer.sharing == (architecture == "llama")
    scores = [score.loglikelihood for score in scorer.score(requests, root)]
    expected = [_over_codes(model, request, format) for request in requests[:5]]
    assert scores[:5] == pytest.approx(expected, abs=1e-3)
    again = LoglikelihoodScorer(model, batch_tokens=512, kv_format=format).score(requests)
    assert scores == pytest.approx([score.loglikelihood for score in again], abs=1e-3)
    gaps = [abs(a - b.loglikelihood) for a, b in zip(scores, plain, strict=True)]
    assert max(gaps) > (1e-2 if bits == 4 else 1e-4)


def test_little_memory_cuts_the_work_and_changes_no_score(tiny: Callable[..., Path]) -> None:
    model = load(tiny()).model
    requests = _questions(questions=12)
    small = LoglikelihoodScorer(model, memory=1, lists=False)
    plenty = LoglikelihoodScorer(model, lists=False)
    for one, other in zip(small.score(requests), plenty.score(requests), strict=True):
        assert one.loglikelihood == pytest.approx(other.loglikelihood, abs=1e-4)
    assert small.tokens_computed > plenty.tokens_computed


@pytest.mark.parametrize("dense", [False, True])
def test_a_quantized_base(tiny: Callable[..., Path], dense: bool) -> None:
    from mlx_slim.config.schema import QuantizeConfig
    from mlx_slim.quantization.apply import quantize_model

    loaded = load(tiny())
    quantize_model(loaded.model, loaded.config, QuantizeConfig(bits=4, group_size=32))
    if dense:
        assert densify(loaded.model) > 0
    requests = _questions()
    assert (
        _differences(LoglikelihoodScorer(loaded.model).score(requests), loaded.model, requests)
        == []
    )


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("lists", [True, False])
def test_threads_change_no_score(
    tiny: Callable[..., Path], num_threads: int, lists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loglikelihood, "default_num_threads", lambda: num_threads)
    model = load(tiny()).model
    requests = _questions(questions=20)
    scorer = LoglikelihoodScorer(model, batch_tokens=64, lists=lists)
    assert _differences(scorer.score(requests), model, requests) == []


def test_few_long_requests_are_in_memory_at_one_time(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny()).model
    draw = random.Random(1)
    texts = [tuple(draw.randint(3, 200) for _ in range(70)) for _ in range(9)]
    requests = [Request((*text, end), len(text)) for text in texts for end in (5, 6)]
    scorer = LoglikelihoodScorer(model, batch_tokens=16)
    monkeypatch.setattr(loglikelihood, "default_num_threads", lambda: 2)
    alive = []
    forward, held = scorer._side_by_side, []

    def counted(function: Any, work: list[tuple]) -> list[Any]:
        results = forward(function, work)
        for _, pairs in results:
            held.extend(weakref.ref(keys) for keys, _ in pairs[:1])
        alive.append(sum(one() is not None for one in held))
        return results

    monkeypatch.setattr(scorer, "_side_by_side", counted)
    assert _differences(scorer.score(requests), model, requests) == []
    assert len(held) > 20 and max(alive) <= 4


def _built(config: dict) -> object:
    model_class, args_class = _get_classes(config)
    mx.random.seed(0)
    model = model_class(args_class.from_dict(config))
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("lists", [True, False])
@pytest.mark.parametrize("window", [6, 60])
def test_sliding_windows(window: int, lists: bool) -> None:
    """Rows that are longer than the window are not computed as lists, shorter ones are."""
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "vocab_size": 264, "sliding_window": window, "tie_word_embeddings": False,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    model = _built(config)
    scorer = LoglikelihoodScorer(model, lists=lists)  # type: ignore[arg-type]
    assert scorer.sharing and scorer.lists == (lists and window > 8)  # rows of the probe
    requests = _questions()
    assert _differences(scorer.score(requests), model, requests) == []


def test_a_recurrent_model_falls_back_and_says_so() -> None:
    config = {
        "model_type": "mamba", "vocab_size": 264, "hidden_size": 32, "intermediate_size": 64,
        "state_size": 8, "num_hidden_layers": 2, "conv_kernel": 4, "use_bias": False,
        "use_conv_bias": True, "time_step_rank": 4, "tie_word_embeddings": True,
    }  # fmt: skip
    model = _built(config)
    scorer = LoglikelihoodScorer(model)  # type: ignore[arg-type]
    assert not scorer.sharing
    assert any("prefixes are not shared: its cache is a ArraysCache" in n for n in scorer.notes)
    requests = _questions(questions=5)
    assert _differences(scorer.score(requests, SHOTS), model, requests) == []


def test_a_model_that_ignores_its_cache_is_detected(tiny: Callable[..., Path]) -> None:
    model = load(tiny()).model

    class Forgetful:
        """Attends to the batch alone: a shared prefix would be lost."""

        def __call__(self, tokens: Any, cache: Any = None):
            return type(model).__call__(model, tokens)

        def __getattr__(self, name: str):
            return getattr(model, name)

    from mlx_slim.evaluation.scoring.prefix_cache import probe

    forgetful = Forgetful()
    assert probe(model, model).reason == ""
    assert probe(model, forgetful).reason  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", ["mistral4", "glm4_moe_lite", "gemma3n"])
def test_attention_that_takes_booleans_or_shares_keys(model_type: str, tmp_path: Path) -> None:
    """Also answers of one token, which some attention computes in another way."""
    model = load(build_case(model_type, tmp_path).model).model
    scorer = LoglikelihoodScorer(model)
    assert scorer.sharing
    assert scorer.score([]) == []
    root = tuple(range(60, 84))
    requests = [
        Request((*root, *context, *answer), len(root) + len(context))
        for context in ((10, 20, 30, 40, 50), (11, 21, 31))
        for answer in ((65, 66), (67,), (65, 68, 69, 70))
    ]
    assert _differences(scorer.score(requests, root), model, requests) == []


def test_nothing_to_score(tiny: Callable[..., Path]) -> None:
    assert LoglikelihoodScorer(load(tiny()).model).score([]) == []


REFERENCES = {  # task -> (reference file, questions of it that every test run scores)
    "hellaswag": ("hellaswag_0shot", 40),
    "arc_easy": ("arc_easy_0shot", 30),
    "mmlu_us_foreign_policy": ("mmlu_us_foreign_policy_5shot", 16),
}


def test_real_scores_are_those_of_the_reference_harness(
    smollm2: Path, data_mirror: Path, references: Path, tmp_path: Path
) -> None:
    """Every log-likelihood within 0.01 nats of PyTorch's; all questions: see the lab log."""
    for task, (name, count) in REFERENCES.items():
        expected = json.loads((references / f"{name}.json").read_text(encoding="utf-8"))
        out = tmp_path / task
        evaluate(smollm2, [task], out, EvalOptions(limit=count, data_dir=data_mirror))
        lines = (out / f"samples_{task}.jsonl").read_text(encoding="utf-8").splitlines()
        samples = [json.loads(line) for line in lines]
        assert len(samples) == count
        for sample, reference in zip(samples, expected["samples"], strict=False):
            values, reference_values = sample["loglikelihoods"], reference["loglikelihoods"]
            assert values == pytest.approx(reference_values, abs=0.01)
            best = sorted(reference_values)[-2:]
            if best[1] - best[0] > 0.01:
                assert sample["prediction"] == reference_values.index(max(reference_values))
                assert sample["acc"] == reference["acc"]
            if "acc_norm" in reference:
                assert sample["acc_norm"] == reference["acc_norm"]
            assert sample["target"] == reference["target"]

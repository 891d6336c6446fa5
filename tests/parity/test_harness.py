"""Scores and windows of the reference harness itself (lm-eval on PyTorch), on a tiny model.

Needs the extra ``bench``: ``make parity``.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.evaluation.scoring.generate import generate_batch
from mlx_slim.evaluation.scoring.loglikelihood import LoglikelihoodScorer
from mlx_slim.evaluation.scoring.perplexity import windows
from mlx_slim.evaluation.scoring.requests import RequestEncoder, max_length
from mlx_slim.export.model import export_hf
from mlx_slim.models.load import Loaded, load
from tests.parity.optional import needed
from tests.parity.torch_side import transformers
from tests.support.tiny import TinyModels

instances = needed("lm_eval.api.instance")
huggingface = needed("lm_eval.models.huggingface")

PAIRS = [
    ("Question: where do fish live?\nAnswer:", " in water"),
    ("Question: where do fish live?\nAnswer:", " on the moon"),
    ("Ends in a space: ", "x"),
    ("", "nothing stands before this"),
    ("long " * 40, "and cut on the left"),
]
TEXT = "Bits per byte of a text that is longer than one window of the model. " * 3
LONGEST = 96
Sides = tuple[Any, Loaded]  # the model of the harness, and ours


@pytest.fixture(scope="module")
def sides(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    """Return the harness's model, and ours, of the same weights."""
    folder = tmp_path_factory.mktemp("harness") / "hf"
    export_hf(tiny("llama"), folder)
    theirs = huggingface.HFLM(
        pretrained=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        max_length=LONGEST,
        device="cpu",
        batch_size=2,
    )
    return theirs, load(folder, dtype=mx.float32)


def harness_requests(kind: str, arguments: list[tuple]) -> list:
    return [
        instances.Instance(request_type=kind, doc={}, arguments=pair, idx=index)
        for index, pair in enumerate(arguments)
    ]


def test_log_likelihoods_are_those_of_the_harness(sides: Sides) -> None:
    theirs, ours = sides
    expected = theirs.loglikelihood(harness_requests("loglikelihood", PAIRS), disable_tqdm=True)
    encoder = RequestEncoder(ours.tokenizer, LONGEST)
    actual = LoglikelihoodScorer(ours.model).score([encoder.request(*pair) for pair in PAIRS])
    for (value, greedy), score in zip(expected, actual, strict=True):
        assert score.loglikelihood == pytest.approx(value, abs=1e-3)
        assert score.greedy == greedy
    assert encoder.truncated == 1


def test_perplexity_is_that_of_the_harness(sides: Sides) -> None:
    theirs, ours = sides
    requests = harness_requests("loglikelihood_rolling", [(TEXT,)])
    (expected,) = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    encoder = RequestEncoder(ours.tokenizer, LONGEST)
    chunks = windows(encoder.document(TEXT), encoder.prefix(), LONGEST)
    assert len(chunks) > 2
    actual = math.fsum(
        score.loglikelihood for score in LoglikelihoodScorer(ours.model).score(chunks)
    )
    assert actual == pytest.approx(expected, abs=1e-2)


def test_greedy_answers_are_those_of_the_harness(sides: Sides) -> None:
    theirs, ours = sides
    contexts = [context for context, _ in PAIRS if context]
    options = {"until": ["zzz"], "max_gen_toks": 8, "do_sample": False}
    requests = harness_requests(
        "generate_until", [(context, dict(options)) for context in contexts]
    )
    expected = theirs.generate_until(requests, disable_tqdm=True)
    encoder = RequestEncoder(ours.tokenizer, max_length=LONGEST)
    assert max_length(ours.config, ours.tokenizer) >= LONGEST
    prompts = [encoder.prompt(context, 8) for context in contexts]
    actual = generate_batch(ours.model, ours.tokenizer, prompts, 8, stops=("zzz",))
    assert [answer.text for answer in actual] == expected

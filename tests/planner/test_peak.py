"""The predicted peak of a step against the measured one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.config.schema import Recipe
from mlx_slim.data.batches import Batch
from mlx_slim.models import attention, structure
from mlx_slim.models.attention import UNBOUNDED
from mlx_slim.planner import peak
from mlx_slim.planner.memory import predict
from mlx_slim.planner.shapes import Block, leaves
from mlx_slim.training.cross_entropy import CrossEntropy
from mlx_slim.training.grad_checkpoint import checkpointed
from mlx_slim.training.optim import Optimizer
from mlx_slim.training.step import Stepper
from tests.support.memory import reset_peak
from tests.support.planner import build, config_of, recipe


@pytest.mark.parametrize(
    ("plan", "batch"),
    [
        (recipe(train={"batch_tokens": 512, "max_length": 128}), (4, 128)),
        (recipe(train={"batch_tokens": 512, "max_length": 256}), (2, 256)),
        (
            recipe(train={"batch_tokens": 512, "max_length": 128, "grad_checkpoint": True}),
            (4, 128),
        ),
        (recipe("qlora", train={"batch_tokens": 512, "max_length": 128}), (4, 128)),
        (recipe("dora", train={"batch_tokens": 512, "max_length": 128}), (4, 128)),
        (recipe("full", train={"batch_tokens": 512, "max_length": 128}), (4, 128)),
    ],
    ids=["lora", "lora-long", "lora-checkpointed", "qlora", "dora", "full"],
)
def test_prediction_is_near_the_measured_peak(
    plan: Recipe, batch: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_peaks_agree(config_of(), plan, batch, monkeypatch, rel=0.15)


_HEADS = {
    "capped": {
        "model_type": "gemma2",
        "hidden_act": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 32,
    },
    "scaled": {
        "model_type": "granite",
        "logits_scaling": 8.0,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "whole": {},
}


@pytest.mark.parametrize("head", list(_HEADS))
def test_heads_with_a_finish_are_planned_as_they_are_computed(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of logits under a soft cap or a scale; all of them where nothing splits."""
    if head == "whole":
        monkeypatch.setattr(structure, "_candidates", lambda model: [])
    plan = recipe(train={"batch_tokens": 512, "max_length": 128, "loss_chunk": 64})
    config = config_of(vocab_size=32768, num_hidden_layers=2, **_HEADS[head])
    assert_peaks_agree(config, plan, (4, 128), monkeypatch, rel=0.25)


_GIB = 2**30
# mlx-train-perf, M1 Max: attention of 32 and 8 heads of 128 over one row of 8,192 positions, GiB.
_MEASURED = {"fused": 0.68, "below 0.32.4": 12.53, "segments": 12.47}


@pytest.mark.parametrize("how", list(_MEASURED))
def test_attention_on_a_mac_is_near_what_was_measured(how: str) -> None:
    length = 8192
    block = Block(
        width=4096,
        norms=2,
        queries=4096,
        keys=1024,
        heads=32,
        inner=0,
        inputs=0,
        outputs=0,
        routed=0,
        largest=0,
        linear=0,
        gated=True,
        fused_length=UNBOUNDED,
    )
    scores = block.scores(length, how == "fused")
    stored = peak.STORED["scores"] * scores + 2 * block.queries + 2 * block.keys
    only_attention = peak.transient_numbers(replace(block, width=0), scores)
    total = (stored + only_attention) * length * 2 / _GIB
    assert total == pytest.approx(_MEASURED[how], rel=0.1)


def _peaks(config: dict[str, Any], gpu: bool = True, **train: Any) -> list[int]:
    """Peaks of rows of 512 and 2,048 tokens, in micro-batches of 2,048."""
    lengths = (512, 2048)
    plans = [recipe(train={"batch_tokens": 2048, "max_length": n, **train}) for n in lengths]
    predictions = [predict(config, plan, gpu=gpu, budget=10**9, suggest=False) for plan in plans]
    return [prediction.predicted_peak_bytes for prediction in predictions]


_WIDE = {"head_dim": 64, "vocab_size": 256}
_SLIDING = {
    **_WIDE,
    "model_type": "gemma3_text",
    "query_pre_attn_scalar": 64,
    "sliding_window_pattern": 2,
}


def test_longer_rows_need_no_more_where_attention_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = _peaks(config_of(**_WIDE))
    assert long == short
    needing: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (config_of(**_WIDE), {"gpu": False}),
        (config_of(**_WIDE), {"batching": "packed"}),  # a mask of segments is an array
        (config_of(vocab_size=256), {}),  # heads of 32 numbers have no kernel
        (config_of(**_SLIDING, sliding_window=1024), {}),  # beyond the window, an array
    ]
    for config, settings in needing:
        short, long = _peaks(config, **settings)
        assert long > 1.3 * short, (config, settings)
    short, long = _peaks(config_of(**_SLIDING, sliding_window=2048))
    assert long == short
    monkeypatch.setattr(attention, "version", lambda package: "0.32.3")
    short, long = _peaks(config_of(**_WIDE))
    assert long > 1.3 * short


def test_a_plan_for_packed_rows_on_a_mac_suggests_grouping(monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"batch_tokens": 2048, "max_length": 2048, "batching": "packed"}
    plan = recipe(train=train)
    prediction = predict(config_of(**_WIDE), plan, gpu=True, budget=1)
    change = next(s for s in prediction.suggestions if s.set == "train.batching=grouped")
    assert change.predicted_peak_bytes == _peaks(config_of(**_WIDE))[1]
    on_cpu = predict(config_of(**_WIDE), plan, gpu=False, budget=1)
    assert all(s.set != "train.batching=grouped" for s in on_cpu.suggestions)


def assert_peaks_agree(
    config: dict[str, Any],
    plan: Recipe,
    batch: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    rel: float,
) -> None:
    if mx.default_device().type == mx.DeviceType.gpu:
        pytest.skip("checked against the unfused CPU kernels")
    monkeypatch.setattr(
        peak, "default_num_threads", lambda: 1
    )  # threads meet by chance: bench plan has them
    vocabulary = config["vocab_size"]
    model = build(config, plan)
    optimizer = Optimizer(model, plan.train)
    rng = np.random.default_rng(0)
    count = batch[0] * batch[1]
    positions = np.sort(rng.permutation(count)[: count * 2 // 3]).astype(np.int32)
    rows = Batch(
        rng.integers(0, vocabulary, batch).astype(np.int32),
        positions,
        rng.integers(0, vocabulary, len(positions)).astype(np.int32),
        np.arange(len(positions)),
        None,
        count,
        batch[0],
        np.full(batch, batch[1], np.int32),
    )
    stepper = Stepper(model, CrossEntropy(model, plan.train.loss_chunk))
    with checkpointed(structure.blocks(model), plan.train.grad_checkpoint):
        mx.eval(optimizer.arrays())
        mx.clear_cache()
        weights = sum(v.nbytes for _, v in leaves(model))
        before = reset_peak()  # other tests' models may still be alive
        stepper.micro(rows)
        measured = mx.get_peak_memory() - before
    prediction = predict(config, plan, gpu=False, budget=1, suggest=False)
    breakdown = prediction.breakdown
    moving = breakdown["activations"] + breakdown["logits"] + breakdown["gradients"]
    assert weights <= breakdown["weights"]
    assert moving == pytest.approx(measured, rel=rel)

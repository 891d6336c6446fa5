"""The predicted peak of a step against the measured one."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.config.schema import Recipe
from mlx_slim.data.batches import Batch
from mlx_slim.models import structure
from mlx_slim.planner import peak
from mlx_slim.planner.memory import predict
from mlx_slim.planner.shapes import leaves
from mlx_slim.training.grad_checkpoint import checkpointed
from mlx_slim.training.optim import Optimizer
from mlx_slim.training.step import CrossEntropy, Stepper
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
    )
    stepper = Stepper(model, CrossEntropy(model, plan.train.loss_chunk))
    with checkpointed(structure.blocks(model), plan.train.grad_checkpoint):
        mx.eval(optimizer.arrays())
        mx.clear_cache()
        weights = sum(v.nbytes for _, v in leaves(model))
        before = mx.get_active_memory()  # other tests' models may still be alive
        mx.reset_peak_memory()
        stepper.micro(rows)
        measured = mx.get_peak_memory() - before
    prediction = predict(config, plan, gpu=False, budget=1, suggest=False)
    breakdown = prediction.breakdown
    moving = breakdown["activations"] + breakdown["logits"] + breakdown["gradients"]
    assert weights <= breakdown["weights"]
    assert moving == pytest.approx(measured, rel=rel)

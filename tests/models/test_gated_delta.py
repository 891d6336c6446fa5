"""The gated delta rule in chunks: the numbers and the gradients of the loop."""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_slim.bench.small_configs import small_config
from mlx_slim.models.build import build
from mlx_slim.models.gated_delta import use_fast_gated_delta
from mlx_slim.runtime import to_float

pytestmark = pytest.mark.skipif(
    not hasattr(mx.fast, "gated_delta_update"), reason="this MLX has no mx.fast.gated_delta_update"
)


def model_of(model_type: str) -> Any:
    mx.random.seed(0)
    model = build(small_config(model_type))
    model.update(
        tree_map(lambda value: value + 0.02 * mx.random.normal(value.shape), model.parameters())
    )
    mx.eval(model.parameters())
    return model


def loss_and_gradients(model: Any) -> tuple[float, dict[str, mx.array]]:
    tokens_BT = mx.arange(60).reshape(2, 30) * 7 % 256

    def loss(parameters: dict) -> mx.array:
        model.update(parameters)
        logits = model(tokens_BT[:, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(logits, tokens_BT[:, 1:]).mean()

    value, gradients = mx.value_and_grad(loss)(model.trainable_parameters())
    mx.eval(value, gradients)
    return to_float(value), cast(dict, tree_flatten(gradients, destination={}))


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_next", "olmo_hybrid"])
def test_losses_and_gradients_are_those_of_the_loop(model_type: str) -> None:
    model = model_of(model_type)
    model.train()
    loss, gradients = loss_and_gradients(model)
    original = {type(module) for module in model.modules()}
    assert use_fast_gated_delta(model)
    changed = {type(module) for module in model.modules()} - original
    assert [kind.__mro__[1] in original for kind in changed] == [True]
    again, others = loss_and_gradients(model)
    assert again == pytest.approx(loss, rel=1e-6)
    for path, value in gradients.items():
        assert mx.allclose(value, others[path], rtol=1e-4, atol=1e-6), path


def test_the_chunked_function_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = model_of("qwen3_5"), []
    update = mx.fast.gated_delta_update

    def counted(*arguments: Any) -> Any:
        calls.append(len(arguments))
        return update(*arguments)

    monkeypatch.setattr(mx.fast, "gated_delta_update", counted)
    use_fast_gated_delta(model)
    mx.eval(model(mx.zeros((1, 5), mx.int32)))
    assert len(calls) == 2  # of four layers two are linear


def test_others_are_left_alone() -> None:
    assert not use_fast_gated_delta(model_of("llama"))
    model = model_of("qwen3_5")
    assert use_fast_gated_delta(model)
    assert not use_fast_gated_delta(model)  # once


def test_a_decay_of_each_channel_stays_with_the_loop() -> None:
    model = model_of("kimi_linear")
    before = model(mx.zeros((1, 5), mx.int32))
    use_fast_gated_delta(model)
    assert mx.array_equal(before, model(mx.zeros((1, 5), mx.int32)))

"""Schedules and optimizers: against formulas, a numpy reference, and a round trip of the state."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_slim.adapters.variants import learning_rate_scale
from mlx_slim.artifacts import load_tensors
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.config.train import TrainConfig
from mlx_slim.runtime import to_float
from mlx_slim.training.optim import Optimizer, schedule, trainable, warmup_steps

OPTIMIZERS = ["adamw", "adam", "adafactor", "lion", "muon", "sgd"]


class Small(nn.Module):
    """An embedding, a hidden matrix, an adapted matrix, a norm and a head."""

    def __init__(self, dtype: mx.Dtype = mx.float32) -> None:
        super().__init__()
        rng = np.random.default_rng(0)

        def draw(*shape: int) -> mx.array:
            return mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)

        self.embed_tokens = {"weight": draw(6, 4)}
        self.up_proj = {"weight": draw(5, 4), "lora_a": draw(4, 2), "lora_b": draw(2, 5)}
        self.norm = {"weight": draw(5)}
        self.lm_head = {"weight": draw(6, 5)}


def _config(**values: Any) -> TrainConfig:
    return TrainConfig(**{"learning_rate": 1e-2, **values})


def _gradients(model: nn.Module, step: int) -> dict[str, mx.array]:
    rng = np.random.default_rng(step + 1)
    return {
        path: mx.array(rng.normal(size=value.shape).astype(np.float32))
        for path, value in trainable(model).items()
    }


# ------------------------------------------------------------------------------------- schedules


def _rates(total: int = 100, **values: Any) -> list[float]:
    rate = schedule(_config(learning_rate=1.0, **values), total)
    return [rate(step) for step in range(total)]


def test_warmup_is_a_fraction_or_a_count() -> None:
    assert warmup_steps(_config(warmup=0.1), 100) == 10
    assert warmup_steps(_config(warmup=0.03), 10) == 1
    assert warmup_steps(_config(warmup=7), 100) == 7
    assert warmup_steps(_config(warmup=500), 100) == 99
    assert warmup_steps(_config(warmup=0), 100) == 0
    assert warmup_steps(_config(warmup=0.5), 1) == 0
    rates = _rates(warmup=4, schedule="constant")
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_constant_stays() -> None:
    assert set(_rates(warmup=0, schedule="constant")) == {1.0}


def test_linear_falls_in_equal_steps() -> None:
    assert _rates(10, warmup=0, schedule="linear") == pytest.approx(
        [1 - step / 10 for step in range(10)]
    )


def test_cosine_is_half_a_cosine() -> None:
    assert _rates(10, warmup=2, schedule="cosine")[2:] == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    )


def test_wsd_is_stable_then_falls_in_the_last_fraction() -> None:
    rates = _rates(100, warmup=0, schedule="wsd", decay=0.2)
    assert rates[:81] == pytest.approx([1.0] * 81)
    assert rates[80:] == pytest.approx([1 - k / 20 for k in range(20)])


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_decays_never_rise_and_end_above_their_floor(name: str, total: int, ratio: float) -> None:
    rates = _rates(total, warmup=0, schedule=name, min_lr_ratio=ratio)
    assert rates[0] == 1.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))
    assert rates[-1] > ratio
    after = schedule(_config(learning_rate=1.0, warmup=0, schedule=name, min_lr_ratio=ratio), total)
    assert after(total) == pytest.approx(ratio)
    assert after(total + 50) == pytest.approx(ratio)


# ------------------------------------------------------------------------------------ optimizers


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_adam_is_the_bias_corrected_formula(name: str) -> None:
    decay = 0.1 if name == "adamw" else 0.0
    model = Small()
    config = _config(optimizer=name, weight_decay=decay, decay_all=True)
    optimizer = Optimizer(model, config)
    expected = {path: np.array(v, dtype=np.float64) for path, v in trainable(model).items()}
    first = {path: np.zeros_like(v) for path, v in expected.items()}
    second = {path: np.zeros_like(v) for path, v in expected.items()}
    for step, rate in enumerate([0.01, 0.02, 0.02, 0.015, 0.001]):
        gradients = _gradients(model, step)
        before = {path: value.copy() for path, value in expected.items()}
        optimizer.update(gradients, rate)
        for path, value in gradients.items():
            g = np.array(value, dtype=np.float64)
            first[path] = 0.9 * first[path] + 0.1 * g
            second[path] = 0.999 * second[path] + 0.001 * g * g
            m = first[path] / (1 - 0.9 ** (step + 1))
            v = second[path] / (1 - 0.999 ** (step + 1))
            expected[path] *= 1 - rate * decay
            expected[path] -= rate * m / (np.sqrt(v) + 1e-8)
        for path, value in trainable(model).items():
            assert np.array(value) == pytest.approx(expected[path], abs=2e-6), (step, path)
            if step == 0 and name == "adam":  # the first step is lr · sign
                moved = before[path] - np.array(value)
                assert moved == pytest.approx(rate * np.sign(np.array(gradients[path])), abs=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_down_a_quadratic(name: str) -> None:
    model = Small()

    def distance() -> float:
        return sum(to_float(mx.square(v - 0.5).sum()) for v in trainable(model).values())

    even = {"fallback_learning_rate": 1e-2} if name == "muon" else {}
    optimizer = Optimizer(model, _config(optimizer=name, **even))
    start = distance()
    for _ in range(60):
        optimizer.update({p: 2 * (v - 0.5) for p, v in trainable(model).items()}, 0.02)
    assert distance() < 0.5 * start


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_small_updates_add_up_whatever_the_dtype(name: str, dtype: mx.Dtype) -> None:
    model = Small(dtype)
    model.norm["weight"] = mx.full((5,), 0.02, dtype=dtype)
    optimizer = Optimizer(model, _config(optimizer=name))
    start = to_float(model.norm["weight"][0])
    assert mx.array(start, dtype=mx.bfloat16) - mx.array(1e-5, dtype=mx.bfloat16) == start
    gradients = {p: mx.ones(v.shape) for p, v in trainable(model).items()}
    rate = 1e-5 if name != "sgd" else 1e-6  # momentum 0.9 makes ten of one
    for _ in range(200):
        optimizer.update(gradients, rate)
    moved = start - to_float(model.norm["weight"][0])
    assert moved == pytest.approx(2e-3, rel=0.1)
    assert model.norm["weight"].dtype == dtype
    assert set(optimizer.masters) == (set() if dtype == mx.float32 else set(trainable(model)))
    assert all(value.dtype == mx.float32 for value in optimizer.masters.values())


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_round_trip_is_bit_for_bit(name: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    config = _config(optimizer=name, weight_decay=0.0 if name == "adam" else 0.1)

    def run(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.update(_gradients(model, step), 1e-3 * (step + 1))

    straight = Small(dtype)
    optimizer = Optimizer(straight, config)
    run(straight, optimizer, range(3))
    mx.save_safetensors(str(tmp_path / "state.safetensors"), optimizer.state())
    weights = dict(trainable(straight))
    run(straight, optimizer, range(3, 6))

    resumed = Small(dtype)
    again = Optimizer(resumed, config)
    resumed.load_weights(list(weights.items()))
    again.load_state(load_tensors(tmp_path / "state.safetensors"))
    run(resumed, again, range(3, 6))
    for path, value in trainable(straight).items():
        assert mx.array_equal(trainable(resumed)[path], value), path
    state = optimizer.state()
    assert set(again.state()) == set(state)
    for path, value in again.state().items():
        assert value.dtype == state[path].dtype
        assert mx.array_equal(value, state[path]), path


def test_state_of_another_optimizer_is_refused() -> None:
    states = {name: Optimizer(Small(), _config(optimizer=name)).state() for name in OPTIMIZERS}
    for name in OPTIMIZERS:
        for other, state in states.items():
            if other != name:
                with pytest.raises(KeyError):
                    Optimizer(Small(), _config(optimizer=name)).load_state(state)
    with pytest.raises(KeyError, match="master/"):
        Optimizer(Small(mx.bfloat16), _config()).load_state(states["adamw"])


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adam"])
def test_decay_is_for_matrices_unless_all_is_said(name: str, everything: bool) -> None:
    model = Small()
    model.norm["bias"] = mx.ones((5,))
    model.up_proj |= {"bias": mx.ones((5,)), "m": mx.ones((5,)), "lora_e": mx.ones((2,))}
    model.experts = {"weight": mx.ones((2, 3, 4)), "bias": mx.ones((2, 3))}
    before = dict(trainable(model))
    config = _config(optimizer=name, weight_decay=0.5, decay_all=everything)
    optimizer = Optimizer(model, config)
    for _ in range(2):
        optimizer.update({p: mx.zeros(v.shape) for p, v in before.items()}, 0.1)
    smaller = {p for p, v in trainable(model).items() if not mx.array_equal(v, before[p])}
    vectors = {"norm.weight", "norm.bias", "experts.bias"}
    vectors |= {f"up_proj.{leaf}" for leaf in ("bias", "m", "lora_e")}
    assert vectors < set(before)
    assert smaller == (set(before) if everything else set(before) - vectors)
    again = Optimizer(model, config)
    again.load_state(optimizer.state())
    assert all(mx.array_equal(v, optimizer.state()[k]) for k, v in again.state().items())


def test_a_checkpoint_without_exemptions_has_the_same_names() -> None:
    """State that an older version wrote, which decayed all, is still found."""
    for name in OPTIMIZERS:
        decay = 0.0 if name == "adam" else 0.1
        old, new = (
            Optimizer(Small(), _config(optimizer=name, weight_decay=decay, decay_all=everything))
            for everything in (True, False)
        )
        assert set(old.state()) == set(new.state())


def test_what_muon_does_not_take_has_another_rate() -> None:
    moved = {}
    for fallback in (None, 2e-3):
        model = Small()
        config = _config(optimizer="muon", learning_rate=0.02, fallback_learning_rate=fallback)
        optimizer, rate = Optimizer(model, config), schedule(config, 100)
        before = dict(trainable(model))
        # Half of the peak: both are scheduled alike.
        half = min(range(3, 100), key=lambda step: abs(rate(step) - 0.01))
        optimizer.update({p: mx.ones(v.shape) for p, v in before.items()}, rate(half))
        moved[fallback] = {p: to_float((before[p] - v).max()) for p, v in trainable(model).items()}
        progress = rate(half) / 0.02
        for path in ("embed_tokens.weight", "norm.weight", "lm_head.weight"):
            assert moved[fallback][path] == pytest.approx((fallback or 3e-4) * progress, rel=1e-3)
    assert moved[None]["up_proj.weight"] == moved[2e-3]["up_proj.weight"] > 1e-3


def test_a_fallback_rate_without_muon_is_an_error() -> None:
    with pytest.raises(ValueError, match="is for optimizer=muon, not adamw"):
        _config(fallback_learning_rate=1e-3)


def test_lora_plus_gives_b_a_multiple_of_the_rate() -> None:
    model = Small()
    adapter = AdapterConfig(lora_plus_ratio=16)
    optimizer = Optimizer(model, _config(), lambda path: learning_rate_scale(path, adapter))
    before = dict(trainable(model))
    optimizer.update({p: mx.ones(v.shape) for p, v in before.items()}, 1e-3)
    moved = {p: to_float((before[p] - v).max()) for p, v in trainable(model).items()}
    assert moved["up_proj.lora_b"] == pytest.approx(16e-3, rel=1e-3)
    assert moved["up_proj.lora_a"] == pytest.approx(1e-3, rel=1e-3)
    assert moved["lm_head.weight"] == pytest.approx(1e-3, rel=1e-3)


def test_muon_orthogonalises_hidden_matrices_only() -> None:
    model = Small()
    names = set(Optimizer(model, _config(optimizer="muon")).state())
    muon = {name for name in names if name.startswith("muon") and "proj" in name}
    assert muon == {
        "muon@1.0/up_proj.weight/v",
        "muon@1.0/up_proj.lora_a/v",
        "muon@1.0/up_proj.lora_b/v",
    }
    for path in ("embed_tokens.weight", "norm.weight", "lm_head.weight"):
        assert f"adamw@1.0/{path}/m" in names

"""AdaLoRA: budget, importance and cuts against a plain reference, export, exact resume."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.adapters.adalora import AdaLoRALinear
from mlx_slim.adapters.inject import adapters_of, inject
from mlx_slim.adapters.store import load_adapter, save_adapter
from mlx_slim.artifacts import load_tensors
from mlx_slim.config.adapter import AdapterConfig, AdaptiveConfig
from mlx_slim.config.load import from_values
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.finetuning.run import finetune
from mlx_slim.models.load import load
from mlx_slim.training.adalora import RankBudget
from mlx_slim.training.optim import set_trainable, trainable
from tests.adapters.support import IDS, linear, relative_error, shake
from tests.support.runs import CtrlC, Recorder, losses, recipe, write_rows
from tests.support.stock import stock_load
from tests.support.tiny import TinyModels

SETTINGS = AdaptiveConfig(target_rank=2, warmup=4, final=6, interval=3)


def _budget(folder: Path, rank: int = 5, config: AdaptiveConfig = SETTINGS, total: int = 30):
    model = load(folder).model
    mx.random.seed(0)
    inject(model, AdapterConfig(rank=rank, adaptive=config), dora=False)
    budget = RankBudget(model, config)
    budget.planned(total)
    return model, budget


def test_the_budget_falls_along_a_cubic_with_exact_ends(tiny: TinyModels) -> None:
    model, budget = _budget(tiny("llama"))
    layers = len(adapters_of(model))
    values = [budget.budget(step) for step in range(31)]
    assert values[:5] == [5 * layers] * 5
    assert values[24:] == [2 * layers] * 7
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert values[14] == 2 * layers + round(3 * layers / 8)


def test_a_fresh_layer_is_its_base_and_orthonormal() -> None:
    base = linear(48, 32, bias=True, bits=None)
    layer = AdaLoRALinear(base, 6, 2.0)
    x = mx.random.normal((3, 48))
    assert mx.array_equal(layer(x), base(x))
    assert mx.allclose(layer.lora_a.T @ layer.lora_a, mx.eye(6), atol=1e-5)
    assert mx.allclose(layer.lora_b @ layer.lora_b.T, mx.eye(6), atol=1e-5)
    shake(layer)
    update = 2.0 * layer.lora_b.T @ mx.diag(layer.lora_e) @ layer.lora_a.T  # s · P Λ Q
    assert relative_error(layer(x), base(x) + x @ update.T) < 1e-5
    assert relative_error(layer.merged_weight(), base["weight"] + update) < 1e-6


def test_gradients_importance_and_cuts_are_those_of_a_plain_reference(tiny: TinyModels) -> None:
    model, budget = _budget(tiny("llama"))
    shake(model, 0.1)
    paths = [path for path, _ in adapters_of(model)]
    rank, rng = 5, np.random.default_rng(0)
    factors = ("lora_e", "lora_a", "lora_b")
    mean: dict[str, np.ndarray] = {}
    spread: dict[str, np.ndarray] = {}
    for step in range(1, 31):
        arrays = {
            k: mx.array(rng.normal(size=v.shape), mx.float32) for k, v in trainable(model).items()
        }
        weights = {k: np.array(v, np.float64) for k, v in trainable(model).items()}
        ours = budget.gradients(arrays)
        for path in paths:
            a, b = weights[f"{path}.lora_a"], weights[f"{path}.lora_b"]
            components = {
                "lora_e": np.zeros(rank),
                "lora_a": 0.4 * a @ (a.T @ a - np.eye(rank)),
                "lora_b": 0.4 * (b @ b.T - np.eye(rank)) @ b,
            }
            for name, penalty in components.items():
                key = f"{path}.{name}"
                gradient = np.array(arrays[key], np.float64) + penalty
                np.testing.assert_allclose(np.array(ours[key]), gradient, atol=1e-4)
                now = np.abs(weights[key] * gradient)
                mean[key] = 0.85 * mean.get(key, 0) + 0.15 * now
                spread[key] = 0.85 * spread.get(key, 0) + 0.15 * np.abs(now - mean[key])
        set_trainable(model, {k: v - 0.01 * ours[k] for k, v in trainable(model).items()})
        budget.updated(step)
        counts = sum(cast(AdaLoRALinear, layer).active for _, layer in adapters_of(model))
        if step in (7, 10, 13, 16, 19, 22, 24) or step > 24:
            assert counts == budget.budget(step), step
        if step in (7, 22, 24):
            scores = {}
            for path in paths:
                score = {n: mean[f"{path}.{n}"] * spread[f"{path}.{n}"] for n in factors}
                for i in range(rank):
                    scores[path, i] = (
                        score["lora_e"][i]
                        + score["lora_a"][:, i].mean()
                        + score["lora_b"][i].mean()
                    )
            best = sorted(scores, key=lambda key: -scores[key])[: budget.budget(step)]
            left = {
                (path, i)
                for path, layer in adapters_of(model)
                for i, value in enumerate(np.array(layer["lora_e"]))
                if value != 0
            }
            assert left == set(best)


def test_the_penalty_is_the_gradient_of_its_formula(tiny: TinyModels) -> None:
    model, budget = _budget(tiny("llama"))
    shake(model, 0.1)
    path, layer = adapters_of(model)[0]

    def penalty(a_IR: mx.array, b_RO: mx.array) -> mx.array:
        unit = mx.eye(5)
        return 0.1 * ((a_IR.T @ a_IR - unit) ** 2).sum() + 0.1 * ((b_RO @ b_RO.T - unit) ** 2).sum()

    expected = mx.grad(penalty, argnums=(0, 1))(layer.lora_a, layer.lora_b)
    zero = {key: mx.zeros(value.shape) for key, value in trainable(model).items()}
    penalized = budget.gradients(zero)
    assert relative_error(penalized[f"{path}.lora_a"], expected[0]) < 1e-5
    assert relative_error(penalized[f"{path}.lora_b"], expected[1]) < 1e-5


def test_what_is_left_is_saved_as_a_plain_lora(tiny: TinyModels, tmp_path: Path) -> None:
    config = AdapterConfig(rank=6, adaptive=AdaptiveConfig(target_rank=2))
    model = load(tiny("llama")).model
    injected = inject(model, config, dora=False)
    shake(model, 0.2)
    for number, (_, layer) in enumerate(adapters_of(model)):
        layer.lora_e = mx.where(mx.arange(6) % 3 == number % 4, layer["lora_e"], 0.0)
    save_adapter(tmp_path / "a", model, config, injected, dora=False, base="base")
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert saved["lora_parameters"]["rank"] == 2
    assert set(saved["ranks"].values()) == {0, 2}
    stock, _ = stock_load(str(tiny("llama")), adapter_path=str(tmp_path / "a"))
    ours = load(tiny("llama")).model
    load_adapter(ours, tmp_path / "a")
    for other in (stock, ours):
        assert relative_error(other(IDS), model(IDS)) < 1e-5


def _adaptive(model: Path, data: Path, **changes: Any):
    values = recipe(model, data).recipe.model_dump(mode="json", exclude_none=True)
    values["adapter"] |= {
        "rank": 6,
        "adaptive": {"target_rank": 3, "warmup": 2, "final": 3, "interval": 2},
        **changes,
    }
    return from_values(values, "adaptive", "test")


def test_a_run_ends_at_its_target_and_learns(tiny: TinyModels, tmp_path: Path) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    small = _adaptive(tiny("llama"), data)
    result = finetune(small, out, observer=Recorder())
    assert losses(out)[10] < losses(out)[1]
    saved = json.loads((out / "adapters" / "adapter_config.json").read_text())
    assert sum(saved["ranks"].values()) == 3 * 21
    assert result.done.best_step is not None and result.done.best_step >= 7
    stock_load(str(tiny("llama")), adapter_path=str(out / "adapters"))


def test_killed_and_resumed_repeats_it_bit_for_bit(tiny: TinyModels, tmp_path: Path) -> None:
    model, data = tiny("llama"), write_rows(tmp_path / "rows.jsonl")
    text = _adaptive(model, data)
    finetune(text, tmp_path / "straight", observer=Recorder())

    out = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        finetune(text, out, observer=CtrlC())
    state = load_tensors(out / "checkpoints" / "step-3" / "callbacks.safetensors")
    assert any(np.array(value).max() > 0 for name, value in state.items() if "mean/" in name)
    finetune(text, out, observer=Recorder(), resume=True)
    assert losses(out) == losses(tmp_path / "straight")
    files = [
        load_tensors(run / "adapters" / "adapters.safetensors")
        for run in (out, tmp_path / "straight")
    ]
    assert all(mx.array_equal(files[0][name], files[1][name]) for name in files[1])


def test_what_does_not_go_together_is_one_error(tiny: TinyModels, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(SlimError, match="target_rank=9 is above rank=6"):
        _adaptive(tiny("llama"), data, adaptive={"target_rank": 9})
    with pytest.raises(SlimError, match="orthonormal"):
        _adaptive(tiny("llama"), data, init="pissa")
    with pytest.raises(SlimError, match="target_rank is missing"):
        _adaptive(tiny("llama"), data, adaptive={"warmup": 1})
    late = _adaptive(tiny("llama"), data, adaptive={"target_rank": 3, "warmup": 6, "final": 5})
    with pytest.raises(SlimError, match="leave none of 10"):
        finetune(late, tmp_path / "run", observer=Recorder())
    tied = _adaptive(tiny("llama-tied"), data, targets=["embed_tokens"])
    with pytest.raises(SlimError, match="AdaLoRA works on linear layers"):
        finetune(tied, tmp_path / "run", observer=Recorder())
    assert not (tmp_path / "run").exists()

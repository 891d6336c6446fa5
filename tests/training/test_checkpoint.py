"""A checkpoint restores weights, optimizer, callbacks and train state, and refuses what is not its.

Whole runs that are killed and resumed are in ``tests/finetuning/test_resume.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_slim.artifacts import load_tensors, save_tensors
from mlx_slim.config.train import TrainConfig
from mlx_slim.errors import SlimError
from mlx_slim.training.checkpoint import load, load_callbacks, save
from mlx_slim.training.optim import Optimizer, trainable
from mlx_slim.training.state import TrainState
from tests.training.test_callbacks import Counter

CONFIG = TrainConfig(optimizer="adamw", weight_decay=0.0)


def _trained(seed: int, bias: bool = False) -> tuple[nn.Module, Optimizer]:
    """Return a layer and its optimizer after one step."""
    mx.random.seed(seed)
    model = nn.Linear(4, 3, bias=bias)
    optimizer = Optimizer(model, CONFIG, lambda path: 1.0)
    gradients = {path: mx.random.normal(value.shape) for path, value in trainable(model).items()}
    optimizer.update(gradients, 1e-2)
    optimizer.evaluate()
    return model, optimizer


def test_everything_comes_back(tmp_path: Path) -> None:
    model, optimizer = _trained(0)
    state = TrainState(step=5, tokens=7, seconds=0.1, best_loss=2.25, best_step=4, required=[4])
    path = save(tmp_path, state, model, optimizer, [Counter(3)])
    other, its_optimizer = _trained(1)
    counter = Counter(0)
    assert load(path, other, its_optimizer, [counter]) == state
    assert counter.count == 3
    assert mx.array_equal(other["weight"], model["weight"])
    first, second = optimizer.state(), its_optimizer.state()
    assert first.keys() == second.keys()
    assert all(mx.array_equal(first[key], second[key]) for key in first)
    record = json.loads((path / "state.json").read_text())
    assert record["callbacks"] == {"counter": {"count": 3}}


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    model, optimizer = _trained(0)
    path = save(tmp_path, TrainState(step=1), model, optimizer, [Counter(3)])
    with pytest.raises(SlimError, match="other trainable weights"):
        load(path, *_trained(1, bias=True), [Counter(0)])
    with pytest.raises(SlimError, match="belongs to another recipe: 'counter'"):
        load_callbacks(path, [])


def test_an_array_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, TrainState(step=1), *_trained(0))
    arrays = load_tensors(path / "optimizer.safetensors")
    name = next(name for name, array in arrays.items() if array.shape == (3, 4))
    save_tensors(path / "optimizer.safetensors", {**arrays, name: mx.zeros((1, 4))})
    with pytest.raises(SlimError, match=r"has the shape \(1, 4\), expected \(3, 4\)"):
        load(path, *_trained(1))


def test_a_checkpoint_without_callbacks_has_no_file_of_them(tmp_path: Path) -> None:
    path = save(tmp_path, TrainState(step=1), *_trained(0))
    assert {file.name for file in path.iterdir() if not file.name.startswith(".")} == {
        "weights.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    with pytest.raises(SlimError, match="belongs to another recipe: 'counter'"):
        load_callbacks(path, [Counter(0)])

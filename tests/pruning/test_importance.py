"""Scores against plain references, against the loss they speak of, and their memory."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_slim.errors import SlimError
from mlx_slim.models import structure
from mlx_slim.models.kinds import HEADS, HIDDEN, MLP
from mlx_slim.models.residual import residual
from mlx_slim.models.route import watched
from mlx_slim.pruning.importance import group_importance
from mlx_slim.pruning.methods import OF_WIDTH
from mlx_slim.pruning.scores import name_of
from mlx_slim.runtime import to_float
from tests.support.memory import reset_peak
from tests.support.prune import (
    ROWS,
    draw_norms,
    layer_of,
    load_tiny,
    scale_groups,
    zero_channels,
)

KINDS = (HEADS, MLP)
TESTED = ["llama", "qwen2", "phi"]


def _loss(model: nn.Module, rows_NT: mx.array = ROWS) -> mx.array:
    losses = nn.losses.cross_entropy(model(rows_NT[:, :-1]), rows_NT[:, 1:])
    return losses.mean()


def _gradients(model: nn.Module, rows_NT: mx.array) -> dict[str, np.ndarray]:
    """Gradients of every weight of the model at once: the slow way."""
    _, gradients = nn.value_and_grad(model, lambda m: _loss(m, rows_NT))(model)
    return {path: np.array(value) for path, value in tree_flatten(gradients)}


def _reference(model: nn.Module, method: str, layer: int, kind: str) -> np.ndarray:
    family = structure.coupled(structure.blocks(model)[layer])[kind]
    weights = {path: np.array(value) for path, value in tree_flatten(model.parameters())}
    whole = _gradients(model, ROWS)
    single = [_gradients(model, ROWS[i : i + 1]) for i in range(len(ROWS))]
    total = np.zeros(family.count)
    for path, axis in family.members:
        full = f"model.layers.{layer}.{path}"
        term = weights[full] * whole[full]
        if method == "taylor2":
            fisher = np.mean([one[full] ** 2 for one in single], axis=0)
            term = term - 0.5 * weights[full] ** 2 * fisher
        if method != "vector":
            term = np.abs(term)
        total += np.moveaxis(term, axis, 0).reshape(family.count, -1).sum(1)
    return np.abs(total)


@pytest.mark.parametrize("architecture", TESTED)
@pytest.mark.parametrize("method", ["taylor", "taylor2", "vector"])
def test_a_layer_at_a_time_equals_all_at_once(
    tmp_path: Path, architecture: str, method: str
) -> None:
    model = load_tiny(tmp_path, architecture).model
    scores = group_importance(model, method, KINDS, ROWS)
    for layer, kind in [(0, HEADS), (0, MLP), (2, HEADS), (2, MLP)]:
        expected = _reference(model, method, layer, kind)
        np.testing.assert_allclose(scores[name_of(layer, kind)], expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("architecture", TESTED)
@pytest.mark.parametrize("kind", KINDS)
def test_first_order_predicts_the_measured_change_of_loss(
    tmp_path: Path, architecture: str, kind: str
) -> None:
    """Scaling a group by 1 − ε changes the loss by −ε Σ w · g, which ``vector`` is the size of."""
    model = load_tiny(tmp_path, architecture).model
    block = structure.blocks(model)[1]
    scores = group_importance(model, "vector", (kind,), ROWS)[name_of(1, kind)]
    group = int(np.argmax(scores))
    step = 0.02
    losses = []
    for factor in (1 - step, 1 / (1 - step) * (1 + step)):
        scale_groups(block, kind, [group], factor)
        losses.append(to_float(_loss(model)))
    measured = abs(losses[1] - losses[0]) / (2 * step)
    assert measured == pytest.approx(float(scores[group]), rel=0.03, abs=2e-6)


@pytest.mark.parametrize("architecture", TESTED)
def test_activation_is_what_a_group_sends_to_the_output_layer(
    tmp_path: Path, architecture: str
) -> None:
    model = load_tiny(tmp_path, architecture).model
    scores = group_importance(model, "activation", KINDS, ROWS)
    block = structure.blocks(model)[1]
    for kind in KINDS:
        family = structure.coupled(block)[kind]
        owner = layer_of(block, family.output.rpartition(".")[0])
        name = family.output.rpartition(".")[2]
        layer, seen = owner[name], []

        class Look(nn.Module):
            def __call__(
                self, x: mx.array, seen: list[mx.array] = seen, layer: nn.Module = layer
            ) -> mx.array:
                seen.append(x)
                return layer(x)

        owner[name] = Look()
        model(ROWS[:, :-1])
        owner[name] = layer
        grouped = np.array(seen[0]).reshape(len(ROWS), ROWS.shape[1] - 1, family.count, -1)
        expected = np.sqrt((grouped**2).sum(axis=(0, 3))).mean(axis=0)
        np.testing.assert_allclose(scores[name_of(1, kind)], expected, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "phi", "gemma3_text"])
def test_a_channel_is_worth_what_norms_send_of_it(tmp_path: Path, architecture: str) -> None:
    model = load_tiny(tmp_path, architecture).model
    draw_norms(model)
    scores = group_importance(model, "activation", (MLP, HIDDEN), ROWS)
    assert sorted(scores) == ["0.mlp", "1.mlp", "2.mlp", HIDDEN]
    stream = residual(model)
    expected = np.zeros(64)
    for layer, block in enumerate(structure.blocks(model)):
        for path in stream.readers[layer]:
            inputs: list[mx.array] = []
            with watched(block, path, inputs.append):
                model(ROWS[:, :-1])
            expected += np.sqrt((np.array(inputs[0]) ** 2).sum(axis=0)).mean(axis=0)
    np.testing.assert_allclose(scores[HIDDEN], expected, rtol=1e-4)
    l2 = group_importance(model, "l2", (HIDDEN,), None)[HIDDEN]
    zero_channels(model, [5, 40])
    zeros = group_importance(model, "activation", (HIDDEN,), ROWS)[HIDDEN]
    assert np.flatnonzero(zeros < 1e-6).tolist() == [5, 40]
    rest = np.setdiff1d(np.arange(64), [5, 40])
    after = group_importance(model, "l2", (HIDDEN,), None)[HIDDEN]
    np.testing.assert_allclose(l2[rest], after[rest], rtol=1e-5)
    one, other = (group_importance(model, "random", (HIDDEN,), None, seed=i) for i in (1, 2))
    assert not np.array_equal(one[HIDDEN], other[HIDDEN])


def test_groups_of_zeros_are_worth_nothing(tmp_path: Path) -> None:
    model = load_tiny(tmp_path).model
    scale_groups(structure.blocks(model)[1], MLP, [7, 99], 0.0)
    scale_groups(structure.blocks(model)[1], HEADS, [1], 0.0)
    for method in (m for m in OF_WIDTH if m not in ("random", "reap")):
        scores = group_importance(model, method, KINDS, ROWS)
        zero = np.flatnonzero(scores[name_of(1, MLP)] == 0)
        assert zero.tolist() == [7, 99], method
        assert np.flatnonzero(scores[name_of(1, HEADS)] == 0).tolist() == [1], method


def test_random_is_seeded(tmp_path: Path) -> None:
    model = load_tiny(tmp_path).model
    one, same, other = (
        group_importance(model, "random", KINDS, None, seed=seed) for seed in (3, 3, 4)
    )
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not any(np.array_equal(one[name], other[name]) for name in one)
    assert not np.array_equal(one[name_of(0, MLP)], one[name_of(1, MLP)])


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = load_tiny(tmp_path).model
    before = dict(tree_flatten(model.parameters()))
    kinds = [type(block) for block in structure.blocks(model)]
    for method in (m for m in OF_WIDTH if m != "reap"):
        group_importance(model, method, KINDS, ROWS)
    after = dict(tree_flatten(model.parameters()))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[path], after[path]) for path in before)
    assert kinds == [type(block) for block in structure.blocks(model)]
    assert dict(tree_flatten(model.trainable_parameters())).keys() == before.keys()


def test_memory_does_not_grow_with_layers_times_weights(tmp_path: Path) -> None:
    def rise(layers: int) -> int:
        model = load_tiny(
            tmp_path / str(layers), num_hidden_layers=layers, hidden_size=256, intermediate_size=768
        ).model
        before = reset_peak()
        group_importance(model, "taylor2", KINDS, ROWS[:2])
        return mx.get_peak_memory() - before

    few, many = rise(2), rise(8)
    block = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768)
    assert few > block  # a block's gradients are in it
    assert many - few < block  # six more layers, and less than one more of them


def test_activations_over_the_budget_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="activations of the calibration rows") as caught:
        group_importance(load_tiny(tmp_path).model, "taylor", KINDS, ROWS, budget=1000)
    assert "--samples" in caught.value.hint


def test_a_score_that_is_no_number_is_refused(tmp_path: Path) -> None:
    model = load_tiny(tmp_path).model
    block = structure.blocks(model)[0]
    scale_groups(block, MLP, [0], float("inf"))
    with pytest.raises(SlimError, match="not finite"):
        group_importance(model, "l2", KINDS, None)

"""Which layers go: similarities and losses against plain references."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_slim.errors import SlimError
from mlx_slim.models import structure
from mlx_slim.pruning.depth import angular_distance, block_influence, choose_layers
from mlx_slim.pruning.methods import OF_DEPTH
from mlx_slim.pruning.surgery import without_layers
from mlx_slim.runtime import to_float
from tests.support.prune import ROWS, load_tiny, make_identity


def _model(tmp_path: Path, layers: int = 5, architecture: str = "llama"):
    return load_tiny(tmp_path, architecture, num_hidden_layers=layers)


def _hidden(model: Any) -> list[np.ndarray]:
    """What enters each block and leaves the last, computed by hand."""
    h = model.model.embed_tokens(ROWS[:, :-1])
    mask = nn.MultiHeadAttention.create_additive_causal_mask(h.shape[1])
    states = [h]
    for block in model.model.layers:
        states.append(block(states[-1], mask, None))
    return [np.array(state, np.float64) for state in states]


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize("architecture", ["llama", "phi"])
def test_an_identity_layer_has_no_influence_and_goes(tmp_path: Path, architecture: str) -> None:
    source = _model(tmp_path, architecture=architecture)
    make_identity(structure.blocks(source.model)[2])
    scores = block_influence(source.model, ROWS, ())
    assert abs(scores[2]) < 1e-6 < 1e-4 < min(scores[:2] + scores[3:])
    for method in OF_DEPTH:
        if method != "random":
            removal = choose_layers(source.model, method, 1, [0, 1, 2, 3, 4], ROWS)
            assert method == "perplexity" or removal.layers == [2], method


def test_block_influence_is_the_mean_over_the_positions_that_count(tmp_path: Path) -> None:
    model = _model(tmp_path).model
    states = _hidden(model)
    tokens = np.array(ROWS[:, :-1])
    special = {int(tokens[0, 3]), int(tokens[2, 5])}
    counted = ~np.isin(tokens, list(special))
    counted[:, 0] = False
    expected = [1 - _cosine(a, b)[counted].mean() for a, b in itertools.pairwise(states)]
    np.testing.assert_allclose(block_influence(model, ROWS, special), expected, atol=1e-5)
    with pytest.raises(SlimError, match="special tokens"):
        block_influence(model, ROWS, set(range(300)))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_angles_span_the_block_at_the_last_position(tmp_path: Path, count: int) -> None:
    model = _model(tmp_path).model
    states = _hidden(model)
    expected = [
        np.mean(np.arccos(_cosine(states[i][:, -1], states[i + count][:, -1]))) / math.pi
        for i in range(len(states) - count)
    ]
    np.testing.assert_allclose(angular_distance(model, ROWS, count), expected, atol=1e-5)
    removal = choose_layers(model, "angular", count, [0, 1, 2, 3, 4], ROWS)
    first = int(np.argmin(expected))
    assert removal.layers == list(range(first, first + count))


def test_perplexity_is_greedy_and_its_losses_are_those_of_the_smaller_models(
    tmp_path: Path,
) -> None:
    source = _model(tmp_path)

    def loss(layers: list[int]) -> float:
        small, _ = without_layers(source.model, source.config, layers)
        logits = small(ROWS[:, :-1])  # pyright: ignore
        return to_float(nn.losses.cross_entropy(logits, ROWS[:, 1:]).mean())

    removal = choose_layers(source.model, "perplexity", 2, [1, 2, 3, 4], ROWS)
    first = {layer: loss([layer]) for layer in (1, 2, 3, 4)}
    assert removal.scores == pytest.approx(first, rel=1e-4)
    one = min(first, key=lambda layer: first[layer])
    second = {layer: loss([one, layer]) for layer in first if layer != one}
    two = min(second, key=lambda layer: second[layer])
    assert [layer for layer, _ in removal.steps] == [one, two]
    assert removal.steps[1][1] == pytest.approx(second[two], rel=1e-4)
    assert removal.layers == sorted([one, two])


def test_random_is_seeded_and_protection_holds(tmp_path: Path) -> None:
    model = _model(tmp_path, 8).model
    draws = {
        seed: choose_layers(model, "random", 3, [2, 3, 4, 5], None, seed=seed).layers
        for seed in range(8)
    }
    assert choose_layers(model, "random", 3, [2, 3, 4, 5], None, seed=5).layers == draws[5]
    assert len({tuple(layers) for layers in draws.values()}) > 1
    for method in OF_DEPTH:
        layers = choose_layers(model, method, 2, [3, 4, 5], ROWS).layers
        assert len(layers) == 2 and set(layers) <= {3, 4, 5}, method
    with pytest.raises(SlimError, match="4 layers cannot be removed"):
        choose_layers(model, "random", 4, [3, 4, 5], None)
    assert mx.isfinite(model(ROWS)).all()  # pyright: ignore

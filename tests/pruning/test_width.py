"""Widths from shapes alone, and the groups that are retained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlx_slim.errors import SlimError
from mlx_slim.models import structure
from mlx_slim.models.build import build
from mlx_slim.models.kinds import HEADS, HIDDEN, MLP
from mlx_slim.models.residual import residual
from mlx_slim.planner.shipped_models import SHIPPED_CONFIGS
from mlx_slim.pruning.counts import count
from mlx_slim.pruning.width import (
    ANY,
    WidthLimits,
    allowed_sizes,
    hidden_sizes,
    retain,
    sizes_for,
    sizes_named,
    sizes_within,
)

TINYLLAMA = SHIPPED_CONFIGS["TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"]
LLAMA = SHIPPED_CONFIGS["meta-llama/Llama-2-7b-hf"]
PHI = SHIPPED_CONFIGS["microsoft/phi-2"]
SMOL = SHIPPED_CONFIGS["HuggingFaceTB/SmolLM2-135M-Instruct"]


def _families(config: dict[str, Any]):
    model = build(config)
    channels = residual(model).channels
    return [{**structure.coupled(block), HIDDEN: channels} for block in structure.blocks(model)]


@pytest.mark.parametrize("config", [TINYLLAMA, PHI, SMOL, LLAMA])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.9])
def test_widths_still_quantize_and_no_more_goes_than_asked(
    config: dict[str, Any], ratio: float
) -> None:
    families = _families(config)
    layers = list(range(len(families)))
    sizes = sizes_for(families, ratio, (HEADS, MLP), layers)
    heads, neurons = families[0][HEADS], families[0][MLP]
    assert sizes[MLP][0] % 64 == 0 and sizes[HEADS][0] * heads.width % 64 == 0
    assert 0 < (neurons.count - sizes[MLP][0]) <= ratio * neurons.count
    assert 0 <= (heads.count - sizes[HEADS][0]) <= ratio * heads.count


@pytest.mark.parametrize("fraction", [0.9, 0.7, 0.5])
def test_a_target_is_met_and_nearly_used(fraction: float) -> None:
    counts = count(build(SMOL))
    families = _families(SMOL)
    layers = list(range(4, 28))
    target = int(fraction * counts.total)
    for kinds in ((HEADS, MLP), (MLP,)):
        if fraction < 0.7:
            continue
        after = counts.with_sizes(sizes_within(families, target, kinds, layers, counts))
        step = 64 * counts.groups[MLP][0] * len(layers)
        assert target - step < after <= target
    for kinds in ((HIDDEN,), (HEADS, MLP, HIDDEN)):
        sizes = sizes_within(families, target, kinds, list(range(30)), counts)
        assert counts.with_sizes(sizes) <= target
        assert sizes[HIDDEN][0] % 64 == 0
        if kinds == (HIDDEN,):
            assert counts.with_sizes({HIDDEN: [sizes[HIDDEN][0] + 64] * 30}) > target
    with pytest.raises(SlimError, match="cannot be reached: the smallest"):
        sizes_within(families, counts.total // 5, (HEADS,), layers, counts)


def test_head_counts_where_no_count_is_a_multiple_of_64() -> None:
    families = {HEADS: structure.Coupled(HEADS, 5, 1, 40, (), "")}
    assert allowed_sizes(families, HEADS, (HEADS,)) == [5, 4, 3, 2, 1]
    families = {HEADS: structure.Coupled(HEADS, 8, 1, 16, (), "")}
    assert allowed_sizes(families, HEADS, (HEADS,)) == [8, 4]
    families = {MLP: structure.Coupled(MLP, 200, 1, 1, (), "")}
    assert allowed_sizes(families, MLP, (MLP,)) == [200, 192, 128, 64]


def _family(heads: int, queries: int, head_dim: int, hidden: int) -> dict[str, structure.Coupled]:
    return {
        HEADS: structure.Coupled(HEADS, heads, queries, queries * head_dim, (), ""),
        MLP: structure.Coupled(MLP, 512, 1, 1, (), ""),
        HIDDEN: structure.Coupled(HIDDEN, hidden, 1, 1, (), ""),
    }


DERIVED = WidthLimits(head_dim_is_derived=True)
DIVIDED = WidthLimits(heads_divide_hidden=True)


def test_the_residual_stream_is_a_multiple_of_64_that_the_config_can_express() -> None:
    families = _family(heads=3, queries=3, head_dim=64, hidden=576)
    assert hidden_sizes(families, 3, ANY) == [576, 512, 448, 384, 320, 256, 192, 128, 64]
    assert hidden_sizes(families, 2, DIVIDED) == [576, 384, 192]
    assert allowed_sizes(families, HEADS, (HEADS, HIDDEN), DIVIDED) == [3, 2, 1]
    both = [_family(heads=32, queries=1, head_dim=80, hidden=2560)] * 2
    sizes = sizes_for(both, 0.2, (HEADS, MLP, HIDDEN), [0, 1], DERIVED)
    assert sizes == {HEADS: [28, 28], MLP: [448, 448], HIDDEN: [2240, 2240]}
    sizes = sizes_for([families] * 2, 0.2, (HIDDEN,), [0, 1], ANY)
    assert sizes == {HIDDEN: [512, 512]}


def test_sizes_by_number_are_possible_or_refused_with_the_nearest() -> None:
    families = [_family(heads=3, queries=3, head_dim=64, hidden=576)] * 2
    assert sizes_named(families, {HIDDEN: 512, HEADS: 2}, ANY) == {
        HIDDEN: [512] * 2,
        HEADS: [2] * 2,
    }
    for named, message, hint in (
        ({HIDDEN: 500}, "--hidden-size 500 is not possible: the model has 576", "448, 512"),
        ({MLP: 1000}, "--intermediate-size 1,000 is not possible: the model has 512", "448, 512"),
        ({HEADS: 4}, "--kv-heads 4 is not possible: the model has 3", "2, 3"),
    ):
        with pytest.raises(SlimError, match=message) as caught:
            sizes_named(families, named, ANY)
        assert hint in caught.value.hint
    derived = [_family(heads=2, queries=7, head_dim=64, hidden=896)] * 2
    assert sizes_named(derived, {HIDDEN: 448}, DERIVED) == {HIDDEN: [448] * 2, HEADS: [1] * 2}
    for named in ({HIDDEN: 512}, {HIDDEN: 448, HEADS: 2}):
        with pytest.raises(SlimError, match="--hidden-size"):
            sizes_named(derived, named, DERIVED)


def test_the_highest_scores_stay() -> None:
    families = [{MLP: structure.Coupled(MLP, 128, 1, 1, (), "")}] * 3
    random = np.random.default_rng(0)
    scores = {f"{i}.mlp": random.random(128).astype(np.float32) for i in range(3)}
    retained = retain(families, scores, {MLP: [64, 128, 64]}, [0, 2], "layer")[MLP]
    assert [len(groups) for groups in retained] == [64, 128, 64]
    for layer in (0, 2):
        gone = np.setdiff1d(np.arange(128), retained[layer])
        assert scores[f"{layer}.mlp"][gone].max() <= scores[f"{layer}.mlp"][retained[layer]].min()
        assert (np.diff(retained[layer]) > 0).all()


def test_global_ranking_cuts_where_least_is_lost() -> None:
    families = [{MLP: structure.Coupled(MLP, 256, 1, 1, (), "")}] * 4
    scores = {f"{i}.mlp": np.full(256, 1.0 + i, np.float32) for i in range(4)}
    sizes = {MLP: [256, 192, 192, 192]}
    retained = retain(families, scores, sizes, [1, 2, 3], "global")[MLP]
    assert [len(groups) for groups in retained] == [256, 64, 256, 256]
    assert sum(map(len, retained)) == sum(sizes[MLP])

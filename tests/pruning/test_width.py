"""Widths from shapes alone, and the groups that are retained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlx_slim.errors import SlimError
from mlx_slim.models import structure
from mlx_slim.models.build import build
from mlx_slim.models.structure import HEADS, MLP
from mlx_slim.planner.shipped_models import SHIPPED_CONFIGS
from mlx_slim.pruning.counts import count
from mlx_slim.pruning.width import allowed_sizes, retain, sizes_for, sizes_within

TINYLLAMA = SHIPPED_CONFIGS["TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"]
LLAMA = SHIPPED_CONFIGS["meta-llama/Llama-2-7b-hf"]
PHI = SHIPPED_CONFIGS["microsoft/phi-2"]
SMOL = SHIPPED_CONFIGS["HuggingFaceTB/SmolLM2-135M-Instruct"]


def _families(config: dict[str, Any]):
    return [structure.coupled(block) for block in structure.blocks(build(config))]


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
    with pytest.raises(SlimError, match="cannot be reached: the smallest"):
        sizes_within(families, counts.total // 5, (HEADS,), layers, counts)


def test_head_counts_where_no_count_is_a_multiple_of_64() -> None:
    family = structure.Coupled(HEADS, 5, 1, 40, (), "")
    assert allowed_sizes(family) == [5, 4, 3, 2, 1]
    family = structure.Coupled(HEADS, 8, 1, 16, (), "")
    assert allowed_sizes(family) == [8, 4]
    assert allowed_sizes(structure.Coupled(MLP, 200, 1, 1, (), "")) == [200, 192, 128, 64]


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

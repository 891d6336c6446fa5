"""What is cut is what was meant: zero groups, masks, whole layers, configs with lists per layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_slim.errors import SlimError
from mlx_slim.models import structure
from mlx_slim.models.build import WIDTHS, build, widths_of
from mlx_slim.models.kinds import HEADS, HIDDEN, MLP
from mlx_slim.models.load import Loaded
from mlx_slim.planner.shapes import leaves
from mlx_slim.pruning import surgery
from mlx_slim.pruning.counts import count
from tests.support.prune import (
    draw_norms,
    layer_of,
    load_tiny,
    make_identity,
    relative_gap,
    scale_groups,
    stock_of,
    zero_channels,
)
from tests.support.tiny import ARCHITECTURES

# uniform heads need a head_dim that the config can say; the others are read by our own loader
HEADED = ["llama", "llama-mha", "llama-tied", "mistral", "qwen3"]


def _retained(model: nn.Module, removed: dict[str, list[list[int]]]) -> dict[str, list[np.ndarray]]:
    families = [structure.coupled(block) for block in structure.blocks(model)]
    return {
        kind: [
            np.setdiff1d(np.arange(family_of[kind].count), removed_groups)
            for family_of, removed_groups in zip(families, layers, strict=True)
        ]
        for kind, layers in removed.items()
    }


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("uniform", [True, False])
def test_groups_of_zeros_leave_no_trace(tmp_path: Path, architecture: str, uniform: bool) -> None:
    source = load_tiny(tmp_path, architecture)
    model = source.model
    removed: dict[str, list[list[int]]] = {MLP: [[*range(5, 69)], [*range(64)], [*range(64, 128)]]}
    if not uniform:
        removed[MLP][1] = []
    if architecture in HEADED or not uniform:
        removed[HEADS] = [[1], [0], [1]] if uniform else [[1], [], [0]]
    for kind, layers in removed.items():
        for block, groups in zip(structure.blocks(model), layers, strict=True):
            scale_groups(block, kind, groups, 0.0)
    retained = _retained(model, removed)
    small, config = surgery.with_groups(model, source.config, retained, uniform=uniform)
    assert relative_gap(model, small) < 1e-5
    assert (WIDTHS in config) is not uniform
    if uniform:
        assert config["intermediate_size"] == 64
    else:
        assert [w["intermediate_size"] for w in widths_of(small)] == [64, 128, 64]
    assert widths_of(build(config)) == widths_of(small)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi"])
@pytest.mark.parametrize("kind", [HEADS, MLP])
def test_slicing_equals_masking(tmp_path: Path, architecture: str, kind: str) -> None:
    """Masking silences what a group sends to the output layer; its own weights stay."""
    source = load_tiny(tmp_path, architecture, num_key_value_heads=2)
    groups = [[1], [0], [1]] if kind == HEADS else [[3, 50], [127], [0, 1, 64]]
    small, _ = surgery.with_groups(
        source.model, source.config, _retained(source.model, {kind: groups}), uniform=False
    )
    for block, removed_groups in zip(structure.blocks(source.model), groups, strict=True):
        family = structure.coupled(block)[kind]
        output = layer_of(block, family.output)
        columns = [g * family.width + i for g in removed_groups for i in range(family.width)]
        weight = np.array(output.weight)
        weight[:, columns] = 0.0
        output.weight = mx.array(weight)
    assert relative_gap(source.model, small) < 1e-5


STREAMS = ["llama", "llama-tied", "mistral", "qwen3", "gemma3_text"]


def _wide(tmp_path: Path, architecture: str, **changes: Any) -> Loaded:
    source = load_tiny(tmp_path, architecture, **{"hidden_size": 192, "head_dim": 16, **changes})
    draw_norms(source.model)
    return source


def _channels(count: int, stays: int) -> np.ndarray:
    return np.sort(np.random.default_rng(5).permutation(count)[:stays])


@pytest.mark.parametrize("architecture", STREAMS)
def test_removed_channels_equal_zeroed_channels(tmp_path: Path, architecture: str) -> None:
    """In our classes and in those of mlx-lm, which scale a Gemma 3 otherwise."""
    source = _wide(tmp_path, architecture)
    stays = _channels(192, 128)
    retained = {HIDDEN: [stays] * 3}
    small, config = surgery.with_groups(source.model, source.config, retained, uniform=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surgery, "corrected", lambda *_: {})
        plain, _ = surgery.with_groups(source.model, source.config, retained, uniform=True)
    zero_channels(source.model, np.setdiff1d(np.arange(192), stays))
    assert config["hidden_size"] == 128 and config["head_dim"] == 16
    assert relative_gap(source.model, small) < 1e-3
    assert relative_gap(source.model, plain) > 0.1
    zeroed = stock_of(source.config, source.model)
    assert relative_gap(zeroed, stock_of(config, small)) < 1e-3


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_channels_go_with_heads_and_neurons(tmp_path: Path, architecture: str) -> None:
    source = _wide(tmp_path, architecture, hidden_size=128, intermediate_size=192)
    removed = {HEADS: [[1], [0], [1]], MLP: [[*range(64)]] * 3}
    for kind, layers in removed.items():
        for block, groups in zip(structure.blocks(source.model), layers, strict=True):
            scale_groups(block, kind, groups, 0.0)
    stays = _channels(128, 64)
    retained = {**_retained(source.model, removed), HIDDEN: [stays] * 3}
    small, config = surgery.with_groups(source.model, source.config, retained, uniform=True)
    zero_channels(source.model, np.setdiff1d(np.arange(128), stays))
    assert relative_gap(source.model, small) < 1e-3
    sizes = {kind: [len(groups) for groups in layers] for kind, layers in retained.items()}
    numbers = sum(value.size for _, value in leaves(small))
    assert numbers == count(build(source.config)).with_sizes(sizes)
    assert (config["num_attention_heads"], config["hidden_size"]) == (2, 64)


class _NormOfChannels(nn.Module):
    """A LayerNorm whose mean and variance are those of some channels; the others are zero."""

    def __init__(self, norm: Any, channels: np.ndarray) -> None:
        super().__init__()
        self._norm, self._channels = norm, mx.array(channels)

    def __call__(self, x: mx.array) -> mx.array:
        part = mx.take(x, self._channels, axis=-1)
        mean, variance = part.mean(-1, keepdims=True), part.var(-1, keepdims=True)
        return (x - mean) / mx.sqrt(variance + self._norm.eps) * self._norm.weight + self._norm.bias


def test_phi_and_qwen2_lose_channels_with_whole_heads(tmp_path: Path) -> None:
    for architecture, kv_heads in (("phi", 4), ("qwen2", 2)):
        source = load_tiny(tmp_path, architecture, hidden_size=128, num_key_value_heads=kv_heads)
        draw_norms(source.model)
        stays = _channels(128, 64)
        heads = [
            [*range(kv_heads // 2)],
            [*range(kv_heads // 2, kv_heads)],
            [*range(kv_heads // 2)],
        ]
        for block, groups in zip(structure.blocks(source.model), heads, strict=True):
            scale_groups(block, HEADS, groups, 0.0)
        retained = {**_retained(source.model, {HEADS: heads}), HIDDEN: [stays] * 3}
        small, config = surgery.with_groups(source.model, source.config, retained, uniform=True)
        zero_channels(source.model, np.setdiff1d(np.arange(128), stays))
        if architecture == "phi":
            body: Any = source.model["model"]
            for block in structure.blocks(source.model):
                block.input_layernorm = _NormOfChannels(block.input_layernorm, stays)
            body.final_layernorm = _NormOfChannels(body.final_layernorm, stays)
        assert relative_gap(source.model, small) < 1e-3
        assert relative_gap(small, stock_of(config, small)) < 1e-5
        assert (config["hidden_size"], config["num_attention_heads"]) == (64, 2)


def test_a_llama_whose_heads_do_not_divide_its_width_is_a_mistral(tmp_path: Path) -> None:
    """Transformers refuses to read the config of such a llama, and with it the tokenizer."""
    source = _wide(tmp_path, "llama", num_attention_heads=3, num_key_value_heads=3)
    retained = {HIDDEN: [_channels(192, 128)] * 3}
    small, config = surgery.with_groups(source.model, source.config, retained, uniform=True)
    assert config["model_type"] == "mistral" and config["sliding_window"] is None
    assert relative_gap(small, stock_of(config, small)) < 1e-5
    biased = {**source.config, "attention_bias": True}
    assert surgery.limits_of(biased, hidden=True).heads_divide_hidden
    assert not surgery.limits_of(source.config, hidden=True).heads_divide_hidden
    assert surgery.limits_of(source.config, hidden=False).heads_divide_hidden


def test_gemma_3_loses_layers_in_its_pattern_only(tmp_path: Path) -> None:
    source = load_tiny(tmp_path, "gemma3_text", num_hidden_layers=6)
    block: Any
    for block in structure.blocks(source.model)[2:4]:
        block.post_attention_layernorm.weight = mx.full((64,), -1.0)
        block.post_feedforward_layernorm.weight = mx.full((64,), -1.0)
    small, config = surgery.without_layers(source.model, source.config, [2, 3])
    assert config["num_hidden_layers"] == 4
    assert relative_gap(source.model, small) < 1e-6
    for layers in ([1], [0, 1, 2, 3, 4]):
        with pytest.raises(SlimError, match="every 2th layer of a gemma3 has full attention"):
            surgery.without_layers(source.model, source.config, layers)


def test_something_else_is_something_else(tmp_path: Path) -> None:
    source = load_tiny(tmp_path)
    small, _ = surgery.with_groups(
        source.model, source.config, _retained(source.model, {HEADS: [[1]] * 3}), uniform=True
    )
    assert relative_gap(source.model, small) > 1e-3


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_a_layer_that_does_nothing_can_go(tmp_path: Path, architecture: str) -> None:
    source = load_tiny(tmp_path, architecture)
    make_identity(structure.blocks(source.model)[1])
    small, config = surgery.without_layers(source.model, source.config, [1])
    assert config["num_hidden_layers"] == 2
    assert relative_gap(source.model, small) < 1e-6


def test_lists_with_an_entry_a_layer_are_cut_with_them(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    source = load_tiny(
        tmp_path, num_hidden_layers=4, layer_types=kinds, sliding_window=4, max_window_layers=3
    )
    make_identity(structure.blocks(source.model)[1])
    small, config = surgery.without_layers(source.model, source.config, [1])
    assert config["layer_types"] == [kinds[0], *kinds[2:]]
    assert config["max_window_layers"] == 2
    assert relative_gap(source.model, small) < 1e-6
    config = surgery.config_without_layers({**source.config, WIDTHS: [1, 2, 3, 4]}, [0, 2])
    assert config[WIDTHS] == [2, 4] and config["max_window_layers"] == 1
    with pytest.raises(SlimError, match="has full attention"):
        surgery.without_layers(source.model, source.config, [0, 3])


@pytest.mark.parametrize("head_dim", [None, 32])
def test_fewer_heads_keep_their_size(tmp_path: Path, head_dim: int) -> None:
    changes = {} if head_dim is None else {"head_dim": head_dim}
    source = load_tiny(tmp_path, "mistral", **changes)
    retained = _retained(source.model, {HEADS: [[0]] * 3})
    small, config = surgery.with_groups(source.model, source.config, retained, uniform=True)
    assert config["head_dim"] == (head_dim or 16)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)
    attention: Any = structure.blocks(small)[0].self_attn
    assert attention.rope.dims == (head_dim or 16)


def test_widths_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = load_tiny(tmp_path).config
    good = {"heads": 2, "kv_heads": 1, "intermediate_size": 64}
    assert widths_of(build({**config, WIDTHS: [good] * 3})) == [good] * 3
    for widths, message in [
        ([good] * 2, "2 entries, the model 3 layers"),
        ("wide", "'wide'"),
        ([{**good, "heads": 3}, good, good], "3 heads over 1"),
        ([good, {"heads": 2}, good], r"\[1\]"),
        ([good, good, {**good, "intermediate_size": 0}], r"\[2\]"),
    ]:
        with pytest.raises(SlimError, match=message):
            build({**config, WIDTHS: widths})


def test_other_architectures_are_refused() -> None:
    with pytest.raises(SlimError, match="gemma models cannot be pruned") as caught:
        surgery.check_supported({"model_type": "gemma"})
    assert "llama" in caught.value.hint

"""The residual stream: every tensor that holds its channels, and no other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_slim.models.build import build
from mlx_slim.models.load import load
from mlx_slim.models.residual import corrected, residual
from mlx_slim.runtime import to_float
from tests.support.tiny import ARCHITECTURES, OTHERS, tiny_model

GEMMA_3 = OTHERS["gemma3_text"]
CONFIGS = {**ARCHITECTURES, "gemma3_text": GEMMA_3}


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_channels_are_in_every_tensor_that_another_width_changes(architecture: str) -> None:
    """Built with another hidden size, exactly the members differ in shape, along their axis."""
    config = {**CONFIGS[architecture], "hidden_size": 128}
    heads = config["num_attention_heads"]
    narrow = {**config, "head_dim": 128 // heads}
    wide = {**narrow, "hidden_size": 192}
    stream = residual(build(narrow))
    assert stream.channels.count == 128
    one, other = (dict(tree_flatten(build(c).parameters())) for c in (narrow, wide))
    changed: dict[str, list[int]] = {}
    for path, value in one.items():
        axes = [i for i in range(value.ndim) if value.shape[i] != other[path].shape[i]]
        if axes:
            changed[path] = axes
    if architecture in ("qwen2", "phi"):  # the size of their heads changes along
        members = dict(stream.channels.members)
        assert all(axis in changed[path] for path, axis in members.items())
        assert all("proj" in path or "dense" in path for path in changed.keys() - members.keys())
    else:
        assert changed == {path: [axis] for path, axis in stream.channels.members}


def test_a_gemma_3_is_tied_unless_its_config_or_file_says_otherwise(tmp_path: Path) -> None:
    config = GEMMA_3
    unsaid = {key: value for key, value in config.items() if key != "tie_word_embeddings"}
    assert residual(build(config)).tied and residual(build(unsaid)).tied
    assert not residual(build({**config, "tie_word_embeddings": False})).tied
    folder = tiny_model(tmp_path / "untied", "gemma3_text", tie_word_embeddings=False)
    loaded = load(folder)
    assert not residual(loaded.model).tied and not loaded.config["tie_word_embeddings"]


def test_norms_grow_by_the_root_of_the_ratio_and_the_embedding_by_that_of_rounded_roots() -> None:
    stream = residual(build({**GEMMA_3, "hidden_size": 640}))
    changes = corrected(stream, 576)
    weight = mx.array([0.5, -1.0])  # a norm multiplies by 1 + w
    scale = 25.25 / 24  # √640 in bfloat16, √576
    expected = {
        "model.layers.0.input_layernorm.weight": 1.5 * math.sqrt(640 / 576) - 1,
        "model.norm.weight": 1.5 * math.sqrt(640 / 576) / scale - 1,
        "model.embed_tokens.weight": 0.5 * scale,
    }
    for path, value in expected.items():
        first, second = changes[path](weight).tolist()  # pyright: ignore
        assert first == pytest.approx(value, rel=1e-6)
        assert second == pytest.approx(-scale if "embed" in path else -1.0, rel=1e-6)
    assert len(changes) == 3 * 4 + 2
    half = changes["model.norm.weight"](weight.astype(mx.bfloat16))
    assert half.dtype == mx.bfloat16
    untied = residual(build({**GEMMA_3, "hidden_size": 640, "tie_word_embeddings": False}))
    last = corrected(untied, 576)["model.norm.weight"](weight)
    assert to_float(last[0]) == pytest.approx(1.5 * math.sqrt(640 / 576) - 1, rel=1e-6)


def test_a_layer_norm_is_left_alone() -> None:
    config: dict[str, Any] = ARCHITECTURES["phi"]
    assert corrected(residual(build(config)), 64) == {}

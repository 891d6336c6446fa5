"""Values of a RoPE that cannot be, and where transformers looks for those that can."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.models.normalize import normalize_config
from mlx_slim.models.reference import reference_of
from mlx_slim.models.rope import make_rope

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 192,
}


@pytest.mark.parametrize("value", [0, -2.0, math.nan, math.inf, "4", True, [2.0]])
@pytest.mark.parametrize("kind", ["linear", "yarn", "dynamic"])
def test_a_factor_that_is_no_number_above_zero_is_refused(kind: str, value: Any) -> None:
    with pytest.raises(SlimError, match="has factor="):
        make_rope({"rope_type": kind, "factor": value}, 16, positions=192)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, "10000"])
def test_a_theta_that_is_no_number_above_zero_is_refused(value: Any) -> None:
    with pytest.raises(SlimError, match="rope_theta is"):
        normalize_config({**LLAMA, "rope_theta": value})


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_scaling_that_is_no_object_is_refused(key: str) -> None:
    with pytest.raises(SlimError, match=f"{key} is 'yarn'"):
        normalize_config({**LLAMA, key: "yarn"})


def test_rope_scaling_wins_over_rope_parameters_as_in_transformers() -> None:
    config = {
        **LLAMA,
        "rope_theta": 3e5,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0},
        "rope_scaling": {"rope_type": "linear", "factor": 5.0},
    }
    actual = normalize_config(config).config
    assert actual["rope_theta"] == 3e5 and actual["rope_scaling"]["factor"] == 5.0


def test_a_theta_inside_rope_scaling_is_the_one_that_counts() -> None:
    scaling = {"rope_type": "default", "rope_theta": 5e5}
    actual = normalize_config({**LLAMA, "rope_theta": 1e4, "rope_scaling": scaling}).config
    assert actual["rope_theta"] == 5e5


def test_an_original_context_beside_the_scaling_is_read() -> None:
    config = {**LLAMA, "rope_theta": 1e4, "original_max_position_embeddings": 24}
    rope = reference_of({**config, "rope_scaling": {"type": "yarn", "factor": 3.0}}).rope[0]
    assert rope is not None and rope["original_max_position_embeddings"] == 24


def test_the_default_theta_is_that_of_full_attention() -> None:
    config = {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 7}
    assert normalize_config(config).config["rope_theta"] == 1e6


def test_a_rotated_part_that_is_left_out_is_that_of_transformers() -> None:
    config = {**LLAMA, "model_type": "phi", "intermediate_size": 128, "vocab_size": 64}
    actual = normalize_config(config)
    assert actual.config["partial_rotary_factor"] == 0.5  # mlx-lm's class would take 0.4
    assert any("partial_rotary_factor" in note for note in actual.notes)
    inputs = normalize_config({**config, "partial_rotary_factor": 0.25})
    assert inputs.config["partial_rotary_factor"] == 0.25


@pytest.mark.parametrize(("part", "refused"), [(None, True), (0.5, True), (1.0, False)])
def test_a_class_that_rotates_all_of_a_head_refuses_a_part(
    part: float | None, refused: bool
) -> None:
    config = {**LLAMA, "model_type": "glm", "head_dim": 16}
    if part is not None:
        config["partial_rotary_factor"] = part
    if not refused:
        assert normalize_config(config).config["partial_rotary_factor"] == part
        return
    with pytest.raises(SlimError, match=r"partial_rotary_factor 0\.5 is not supported"):
        normalize_config(config)


@pytest.mark.parametrize("pattern", [1, 2, 3, 5])
def test_a_pattern_of_layers_is_read_from_their_types(pattern: int) -> None:
    kinds = ["sliding_attention"] * (pattern - 1) + ["full_attention"]
    config = {**LLAMA, "model_type": "cohere2", "num_hidden_layers": 4, "rope_theta": 1e4}
    config["layer_types"] = (kinds * 4)[:4]
    assert normalize_config(config).config["sliding_window_pattern"] == pattern
    config["sliding_window_pattern"] = 4
    assert normalize_config(config).config["sliding_window_pattern"] == 4


def test_layers_without_a_pattern_are_refused() -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = {**LLAMA, "model_type": "cohere2", "num_hidden_layers": 4, "layer_types": kinds}
    with pytest.raises(SlimError, match="no regular pattern"):
        normalize_config(config)

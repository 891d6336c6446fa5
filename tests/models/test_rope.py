"""Rotary embeddings against a plain numpy implementation of transformers' formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_slim.errors import SlimError
from mlx_slim.models import structure
from mlx_slim.models.convert import convert
from mlx_slim.models.load import load
from mlx_slim.models.rope import LengthRoPE, ScaledRoPE, make_rope, set_length
from mlx_slim.runtime import to_float
from tests.support.stock import stock_load
from tests.support.tiny import tiny_model

DIMS, THETA, ORIGINAL, POSITIONS = 16, 10000.0, 64, 256
SHORT = [1.0 + 0.1 * i for i in range(DIMS // 2)]
LONG = [2.0 + i for i in range(DIMS // 2)]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": ORIGINAL,
}
KINDS = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, no factor": {**YARN, "factor": None},
    "yarn, attention factor": {**YARN, "attention_factor": 1.5},
    "yarn, not truncated": {**YARN, "truncate": False, "beta_fast": 20, "beta_slow": 2},
    "yarn, mscale": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.4},
    "yarn, one mscale is not read": {**YARN, "mscale": 0.8},
    "longrope": LONGROPE,
    "longrope, attention factor": {**LONGROPE, "attention_factor": 1.25},
}


def reference(rope: dict[str, Any], length: int) -> tuple[list[float], float]:
    """Inverse frequencies and attention factor, pair by pair, as transformers words them."""
    kind: str = rope["rope_type"]
    factor: Any = rope.get("factor")
    base = THETA
    if kind == "dynamic":
        seen = max(length, POSITIONS)
        base *= ((factor * seen / POSITIONS) - (factor - 1)) ** (DIMS / (DIMS - 2))
    inverse = [1 / base ** (2 * i / DIMS) for i in range(DIMS // 2)]
    if kind == "linear":
        inverse = [value / factor for value in inverse]
    scale: Any = 1.0
    if kind == "llama3":
        for i, value in enumerate(inverse):
            wave = 2 * math.pi / value
            if wave > ORIGINAL / 1.0:
                inverse[i] = value / factor
            elif wave >= ORIGINAL / 4.0:
                smooth = (ORIGINAL / wave - 1.0) / (4.0 - 1.0)
                inverse[i] = (1 - smooth) * value / factor + smooth * value
    if kind in ("yarn", "longrope"):
        factor = factor or POSITIONS / ORIGINAL
        scale = rope.get("attention_factor")
    if kind == "longrope":
        scale = scale or math.sqrt(1 + math.log(factor) / math.log(ORIGINAL))
        side = LONG if length > ORIGINAL else SHORT
        inverse = [value / stretch for value, stretch in zip(inverse, side, strict=True)]
    if kind == "yarn":
        if scale is None and rope.get("mscale") and rope.get("mscale_all_dim"):
            log = math.log(factor)
            scale = (0.1 * rope["mscale"] * log + 1) / (0.1 * rope["mscale_all_dim"] * log + 1)
        scale = scale or 0.1 * math.log(factor) + 1

        def pair(turns: Any) -> Any:
            return DIMS * math.log(ORIGINAL / (turns * 2 * math.pi)) / (2 * math.log(THETA))

        low, high = pair(rope.get("beta_fast", 32)), pair(rope.get("beta_slow", 1))
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, DIMS - 1)
        for i, value in enumerate(inverse):
            ramp = min(max((i - low) / (high - low), 0.0), 1.0)
            inverse[i] = value / factor * ramp + value * (1 - ramp)
    return inverse, scale


def rotated(x: np.ndarray, rope: dict, offset: int = 0, length: int | None = None) -> np.ndarray:
    """Rotate ``x`` (B, heads, T, features) as transformers does: cos and sin scaled."""
    steps = x.shape[-2]
    inverse, scale = reference(rope, length or offset + steps)
    angles = np.outer(np.arange(offset, offset + steps), inverse)
    cos, sin = np.cos(angles) * scale, np.sin(angles) * scale
    one, other, rest = np.split(x, [DIMS // 2, DIMS], axis=-1)
    return np.concatenate([one * cos - other * sin, other * cos + one * sin, rest], axis=-1)


def features(steps: int, width: int = DIMS, rows: int = 2) -> np.ndarray:
    return np.random.default_rng(steps).standard_normal((rows, 3, steps, width)).astype(np.float32)


def created(rope: dict) -> ScaledRoPE:
    return make_rope({**rope, "rope_theta": THETA}, DIMS, positions=POSITIONS)


@pytest.mark.parametrize("width", [DIMS, DIMS + 8])
@pytest.mark.parametrize("name", KINDS)
def test_angles_and_scale_are_those_of_transformers_at_every_length(name: Any, width: Any) -> None:
    rope = KINDS[name]
    ours = created(rope)
    for steps, offset in ((5, 0), (ORIGINAL, 0), (ORIGINAL + 1, 0), (3, 90), (POSITIONS + 44, 0)):
        x = features(steps, width)
        actual = np.array(ours(mx.array(x), offset=offset))
        assert np.abs(actual - rotated(x, rope, offset)).max() < 2e-4, (steps, offset)


@pytest.mark.parametrize("name", ["longrope", "dynamic", "yarn"])
def test_rows_of_a_batch_may_begin_at_different_positions(name: str) -> None:
    ours, x = created(KINDS[name]), features(4)
    offsets = mx.array([10, 300])
    actual = np.array(ours(mx.array(x), offset=offsets))
    for row, offset in enumerate((10, 300)):
        expected = rotated(x[row : row + 1], KINDS[name], offset, length=304)
        assert np.abs(actual[row] - expected[0]).max() < 2e-4


def test_a_sequence_computed_in_parts_is_that_of_its_whole_length() -> None:
    ours = created(LONGROPE)
    model = nn.Sequential(ours)
    x = features(100)
    whole = np.array(ours(mx.array(x)))
    assert not set_length(model, 100)
    pieces = [np.array(ours(mx.array(x[:, :, i : i + 20]), offset=i)) for i in range(0, 100, 20)]
    assert np.abs(np.concatenate(pieces, axis=2) - whole).max() < 1e-5
    assert set_length(model, 200), "both are beyond the original context: keys stay right"
    assert not set_length(model, 50), "keys of the long factors are of no use below"
    set_length(model, None)
    assert np.array_equal(np.array(ours(mx.array(x))), whole)


def test_it_compiles_differentiates_and_holds_no_parameters() -> None:
    ours = created({**YARN, "attention_factor": 1.5})
    assert ours.parameters() == {}
    x = mx.array(features(6))
    plain = ours(x)
    assert mx.allclose(mx.compile(ours)(x), plain, atol=1e-5)
    cotangent = mx.grad(lambda x: (ours(x) * plain).sum())(x)
    assert mx.allclose(cotangent, 1.5**2 * x, atol=1e-4), "a rotation's transpose, scaled twice"


def test_in_bfloat16_the_scale_is_not_rounded_before_it_is_used() -> None:
    scale = 0.1 * math.log(4.0) + 1  # 1.13863; the nearest bfloat16 number is 1.140625
    ours = created({**YARN, "attention_factor": scale})
    x = mx.array(features(4096, rows=1)).astype(mx.bfloat16)
    norms = [to_float(mx.square(y.astype(mx.float32)).sum()) for y in (ours(x), x)]
    assert norms[0] / norms[1] == pytest.approx(scale**2, rel=4e-4)


BAD = [
    ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
    ({"rope_type": "linear"}, "factor"),
    ({**LONGROPE, "short_factor": SHORT[:3]}, "3 values in short_factor, expected 8"),
    ({**YARN, "factor": "four"}, "four"),
    ({**LONGROPE, "short_mscale": 1.2, "long_mscale": 1.3}, "short_mscale"),
]


@pytest.mark.parametrize(("rope", "word"), BAD)
def test_parameters_that_cannot_be_are_refused(rope: Any, word: Any) -> None:
    with pytest.raises(SlimError, match=word):
        created(rope)


# ------------------------------------------------------------------------------ in a model


def ropes(folder: Path) -> list[Any]:
    blocks: list[Any] = structure.blocks(load(folder).model)
    return [block.self_attn.rope for block in blocks]


def logits(folder: Path, length: int = 90) -> np.ndarray:
    return np.array(load(folder).model(mx.arange(length)[None] % 250))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "phi"])
@pytest.mark.parametrize("name", ["linear", "yarn, attention factor", "longrope", "llama3"])
def test_every_class_gets_them_by_both_names(tmp_path: Path, architecture: str, name: str) -> None:
    rope = KINDS[name]
    if architecture == "phi":  # half of the head is rotated
        rope = {k: v[: DIMS // 4] if isinstance(v, list) else v for k, v in rope.items()}
    changes = {"rope_scaling": rope, "max_position_embeddings": POSITIONS}
    old = tiny_model(tmp_path / "old", architecture, **changes, rope_theta=5e4)
    actual = ropes(old)
    assert all(isinstance(one, ScaledRoPE) for one in actual)
    assert len(set(map(id, actual))) == 1, "one for all layers"
    config = json.loads((old / "config.json").read_text())
    del config["rope_scaling"], config["rope_theta"]
    new = tmp_path / "new"
    old.rename(new)
    plain = logits(new)
    config["rope_parameters"] = {**rope, "rope_theta": 5e4}
    (new / "config.json").write_text(json.dumps(config))
    assert np.array_equal(logits(new), plain)
    theta = {**config, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
    (new / "config.json").write_text(json.dumps(theta))
    assert np.abs(logits(new) - plain).max() > 1e-3


def test_missing_original_context_is_that_of_the_config(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0}
    folder = tiny_model(tmp_path / "m", rope_scaling=scaling, max_position_embeddings=128)
    full = {**scaling, "original_max_position_embeddings": 128, "rope_theta": THETA}
    expected = make_rope(full, DIMS, positions=128)
    assert mx.array_equal(ropes(folder)[0]._freqs, expected._freqs)


def test_layer_types_may_rotate_differently(tmp_path: Path) -> None:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    nested = {
        "full_attention": {**YARN, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    changes = {"layer_types": layers, "sliding_window": 8, "rope_parameters": nested}
    folder = tiny_model(tmp_path / "m", "qwen2", **changes, use_sliding_window=True)
    kinds = [type(one) for one in ropes(folder)]
    assert kinds == [nn.RoPE, ScaledRoPE, nn.RoPE]
    assert [ropes(folder)[i].base for i in (0, 2)] == [1e4, 1e4]


def test_a_converted_model_loads_the_same_way(tmp_path: Path) -> None:
    changes = {"rope_scaling": LONGROPE, "max_position_embeddings": POSITIONS}
    folder = tiny_model(tmp_path / "m", **changes)
    convert(folder, tmp_path / "again")
    again = ropes(tmp_path / "again")[0]
    assert isinstance(again, LengthRoPE) and again.boundary == ORIGINAL
    for length in (20, 90):
        assert np.array_equal(logits(folder, length), logits(tmp_path / "again", length))


@pytest.mark.parametrize(
    ("architecture", "rope", "message"),
    [
        ("llama", YARN, False),
        ("llama", LLAMA3, False),
        ("llama", {**YARN, "attention_factor": 1.5}, True),
        ("llama", {**YARN, "truncate": False}, True),
        ("llama", LONGROPE, True),
        ("qwen3", {**YARN, "truncate": False}, True),
        ("phi", KINDS["linear"], True),
    ],
)
def test_it_is_said_where_mlx_lm_by_itself_computes_otherwise(
    tmp_path: Path, architecture: str, rope: Any, message: bool
) -> None:
    folder = tiny_model(tmp_path / "m", architecture, rope_scaling=rope)
    loaded = load(folder)
    assert any("mlx-lm by itself does not" in note for note in loaded.notes) == message
    stock, _ = stock_load(str(folder))
    ids = mx.arange(20)[None]
    assert bool(mx.allclose(stock(ids), loaded.model(ids), atol=1e-5).item()) != message


def test_a_theta_that_is_left_out_is_transformers_default(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "qwen2")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load(folder)
    assert loaded.config["rope_theta"] == 10000.0, "mlx-lm's own default is 1e6"
    assert any("default" in note for note in loaded.notes)

"""NaN and infinities in weights are refused while they are read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.artifacts import load_tensors
from mlx_slim.errors import SlimError
from mlx_slim.models.convert import convert
from mlx_slim.models.finite import is_finite
from mlx_slim.models.load import load
from tests.support.tiny import tiny_model

DTYPES = [mx.float32, mx.bfloat16, mx.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_one_bad_value_anywhere_is_seen(dtype: Any, bad: Any) -> None:
    value = mx.random.normal((7, 33)).astype(dtype)
    assert is_finite(value)
    for place in ((0, 0), (3, 17), (6, 32)):
        spoilt = mx.array(value)
        spoilt[place[0], place[1]] = bad
        assert not is_finite(spoilt)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_the_smallest_and_the_zeros_are_numbers(dtype: Any) -> None:
    most = mx.finfo(dtype).max
    assert is_finite(mx.array([most, -most, 0.0, -0.0, mx.finfo(dtype).smallest_normal], dtype))
    assert is_finite(mx.zeros((0, 4), dtype))
    assert is_finite(mx.array(most, dtype)) and not is_finite(mx.array(math.inf, dtype))


def test_integers_are_numbers() -> None:
    assert is_finite(mx.array([0xFFFFFFFF], mx.uint32)) and is_finite(mx.array([True]))


def spoil(folder: Any, value: float) -> str:
    """Put ``value`` into one tensor of a model; return the tensor's name."""
    file = sorted(folder.glob("*.safetensors"))[1]
    weights = load_tensors(file)
    name = next(name for name in sorted(weights) if name.endswith("proj.weight"))
    weights[name][2, 3] = value
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_model_with_such_weights_is_refused(tmp_path: Path, value: Any) -> None:
    folder = tiny_model(tmp_path / "model")
    name = spoil(folder, value)
    with pytest.raises(SlimError, match=f"model: NaN or infinity in {name}"):
        load(folder)
    with pytest.raises(SlimError, match="NaN or infinity"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cast_that_overflows_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    name = spoil(folder, 1e5)
    load(folder)
    with pytest.raises(SlimError, match=f"NaN or infinity in {name}"):
        convert(folder, tmp_path / "out", dtype=mx.float16)
    assert not (tmp_path / "out").exists()

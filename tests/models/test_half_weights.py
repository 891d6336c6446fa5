"""Weights in 16 bits give the bits of the widened ones, in half of the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_slim.evaluation.scoring.loglikelihood import LoglikelihoodScorer
from mlx_slim.evaluation.scoring.requests import Request
from mlx_slim.models.half_weights import HalfLinear, half_numbers
from mlx_slim.models.load import Loaded, load
from mlx_slim.models.tensors import folder_tensors
from tests.support.tiny import ARCHITECTURES, MIXTURES, tiny_model

REQUESTS = [Request(tuple(range(5, 25)), 12), Request(tuple(range(5, 31)), 12)]


def half_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, HalfLinear)]


def nbytes(loaded: Loaded) -> int:
    leaves: Any = tree_flatten(loaded.model.parameters())
    return sum(value.nbytes for _, value in leaves)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURES])
def test_scores_are_those_of_widened_weights(
    tmp_path: Path, architecture: str, dtype: mx.Dtype
) -> None:
    folder = tiny_model(tmp_path / "m", architecture, dtype=dtype)
    wide = load(folder, dtype=mx.float32)
    half = load(folder, dtype=mx.float32, half_blocks=True)
    half_count = sum(module["weight"].size for module in half_layers(half.model))
    assert half_count > 0 and nbytes(half) == nbytes(wide) - 2 * half_count
    assert half_count == half_numbers(half.config, folder_tensors(folder).values(), mx.float32)
    scores = [LoglikelihoodScorer(one.model).score(REQUESTS) for one in (wide, half)]
    assert scores[0] == scores[1]


def test_only_blocks_stored_in_16_bits_stay(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "llama", dtype=mx.bfloat16)
    model = load(folder, dtype=mx.float32, half_blocks=True).model
    dtypes = {path: value.dtype for path, value in tree_flatten(model.parameters())}  # pyright: ignore
    half = {path for path, dtype in dtypes.items() if dtype == mx.bfloat16}
    assert half == {p for p in dtypes if ".layers." in p and "norm" not in p}
    assert {dtypes[path] for path in dtypes.keys() - half} == {mx.float32}
    full = tiny_model(tmp_path / "f", "llama", dtype=mx.float32)
    assert not half_layers(load(full, dtype=mx.float32, half_blocks=True).model)
    assert not half_numbers({}, folder_tensors(full).values(), mx.float32)
    assert not half_numbers({}, folder_tensors(folder).values(), mx.bfloat16)


@pytest.mark.usefixtures("as_on_gpu")
def test_a_gpu_computes_in_one_dtype(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "llama", dtype=mx.bfloat16)
    model = load(folder, dtype=mx.float32, half_blocks=True).model
    leaves: Any = tree_flatten(model.parameters())
    assert not half_layers(model) and {value.dtype for _, value in leaves} == {mx.float32}
    assert not half_numbers({}, folder_tensors(folder).values(), mx.float32)


def test_weights_are_widened_one_at_a_time(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    folder = tiny_model(tmp_path / "m", "llama", dtype=mx.bfloat16, **shape)
    model = load(folder, dtype=mx.float32, half_blocks=True).model
    largest = 4 * 256 * 1024
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model(mx.array([list(range(32))])))
    held = mx.get_peak_memory() - before
    assert held < 6 * largest < sum(m["weight"].size for m in half_layers(model))

"""One new position of each answer: NumPy's attention is MLX's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.evaluation.scoring import answer_cache
from mlx_slim.evaluation.scoring.answer_cache import Prefix, SuffixCache
from mlx_slim.evaluation.scoring.generate import generate_batch
from mlx_slim.models import host_exponentials
from mlx_slim.models.load import load
from mlx_slim.runtime import on_gpu

pytestmark = pytest.mark.skipif(on_gpu(), reason="NumPy's exponentials are a CPU's")


class Stored:
    """What a layer's cache has after the prefix."""

    def __init__(self, keys: mx.array, values: mx.array) -> None:
        self.keys, self.values, self.offset = keys, values, keys.shape[2]


def normal(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("rows", [1, 5])
def test_numpys_attention_is_mlxs(heads: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_exponentials, "FEW", 0)
    monkeypatch.setattr(answer_cache, "_MANY", 0)
    prefix = Prefix(Stored(normal(1, 2, 30, 16, seed=1), normal(1, 2, 30, 8, seed=2)), True)
    cache = SuffixCache([0] * rows, prefix)
    keys, values = normal(rows, 2, 7, 16, seed=3), normal(rows, 2, 7, 8, seed=4)
    mask = mx.random.bernoulli(0.5, (rows, 1, 1, 7), key=mx.random.key(5))

    def attended() -> np.ndarray:
        queries = normal(rows, heads, 1, 16, seed=6)
        return np.array(answer_cache._attend(queries, keys, values, cache, 0.25, mask))

    expected = attended()
    with host_exponentials.host_exponentials():
        ours = attended()
    assert ours.shape == expected.shape == (rows, heads, 1, 8)
    np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_answers_are_the_same(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(tiny(), dtype=mx.float32)
    prompts = [[*range(5, 20), 30 + row, *range(40, 40 + row)] for row in range(6)]
    arguments: tuple[Any, ...] = (loaded.model, loaded.tokenizer, prompts, 12, ())
    by_mlx = generate_batch(*arguments)
    monkeypatch.setattr(host_exponentials, "FEW", 0)
    monkeypatch.setattr(answer_cache, "_MANY", 0)
    assert [one.ids for one in generate_batch(*arguments)] == [one.ids for one in by_mlx]

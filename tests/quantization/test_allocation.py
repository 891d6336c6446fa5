"""Bytes in closed form against MLX's, and the choice under a budget against all mixes."""

from __future__ import annotations

from itertools import pairwise, product

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.models.quantized import LayerFormat
from mlx_slim.quantization.allocation import StoredAs, allocate, hull, layer_bytes
from mlx_slim.quantization.sensitivity import BITS


@pytest.mark.parametrize("shape", [(6, 128), (3, 4, 256)])
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_bytes_of_a_layer_are_those_of_mlx(shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    weight = mx.random.normal(shape, key=mx.random.key(0)).astype(dtype)
    assert layer_bytes(shape, None, dtype.size) == weight.nbytes
    for bits, group in product(BITS, (32, 64, 128)):
        tensors = mx.quantize(weight, group, bits)
        chosen = LayerFormat(group, bits)
        assert layer_bytes(shape, chosen, dtype.size) == sum(one.nbytes for one in tensors)


def _tables(seed: int) -> dict[str, list[StoredAs]]:
    """Return layers with losses that mostly fall with the bytes, and some that do not."""
    draw = np.random.default_rng(seed)
    tables = {}
    for number in range(5):
        sizes = np.sort(draw.choice(np.arange(1, 40), 4, replace=False))
        losses = draw.random(4) * np.array([8, 4, 2, 1])
        pairs = zip(sizes, losses, strict=True)
        tables[f"layer {number}"] = [StoredAs(None, int(n), float(x)) for n, x in pairs]
    return tables


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_within_one_step_of_the_best_mix(seed: int) -> None:
    tables = _tables(seed)
    mixes = [
        (sum(one.nbytes for one in mix), sum(one.loss for one in mix))
        for mix in product(*tables.values())
    ]
    smallest = min(nbytes for nbytes, _ in mixes)
    gains = [a.loss - b.loss for table in tables.values() for a, b in pairwise(hull(table))]
    former = np.inf
    for budget in range(smallest, max(nbytes for nbytes, _ in mixes) + 1, 3):
        chosen = allocate(tables, budget).values()
        loss = sum(one.loss for one in chosen)
        assert sum(one.nbytes for one in chosen) <= budget
        best = min(loss for nbytes, loss in mixes if nbytes <= budget)
        assert best - 1e-9 <= loss <= best + max(gains)
        assert loss <= former + 1e-9, "a larger budget loses no more"
        former = loss
    everything = allocate(tables, max(nbytes for nbytes, _ in mixes)).values()
    assert sum(one.loss for one in everything) == pytest.approx(min(loss for _, loss in mixes))
    with pytest.raises(ValueError, match="over the budget"):
        allocate(tables, smallest - 1)


def test_the_example_of_the_docstring() -> None:
    first = [StoredAs(None, n, loss) for n, loss in ((1, 8.0), (2, 4.0), (3, 3.0))]
    second = [StoredAs(None, n, loss) for n, loss in ((1, 6.0), (2, 3.0), (3, 0.0))]
    chosen = allocate({"first": first, "second": second}, 5)
    assert (chosen["first"].nbytes, chosen["second"].nbytes) == (2, 3)
    assert sum(one.loss for one in chosen.values()) == 4


def test_the_hull_drops_what_is_dominated_and_what_lies_above_a_line() -> None:
    below, above, dominated = StoredAs(None, 2, 4.0), StoredAs(None, 3, 3.9), StoredAs(None, 5, 6.0)
    ends = StoredAs(None, 1, 8.0), StoredAs(None, 4, 0.0)
    assert hull([dominated, above, ends[1], below, ends[0]]) == [ends[0], below, ends[1]]
    assert hull([StoredAs(None, 2, 1.0), StoredAs(None, 2, 3.0)]) == [StoredAs(None, 2, 1.0)]

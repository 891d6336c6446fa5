"""NumPy's attention and SwiGLU, with gradients, are MLX's."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.models import activations
from mlx_slim.models.host_attention import (
    Visible,
    attention,
    attention_gradients,
    swiglu,
    swiglu_gradients,
)
from mlx_slim.models.prefix_attention import _NODES, prefix_attention


def _inputs(rows: int, heads: int, keys: int, length: int, width: int = 16) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(rows, count, length, width) for count in (heads, keys, keys, heads)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _differing(
    inputs: list[np.ndarray], visible: Visible, mask: Any, nodes: Any = None
) -> list[str]:
    """What differs from MLX's: the output, or a gradient."""
    q, k, v, cotangent = inputs

    def stock(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)

    with prefix_attention(nodes):
        (expected,), gradients = mx.vjp(
            stock, [mx.array(x) for x in (q, k, v)], [mx.array(cotangent)]
        )
        mx.eval(expected, gradients)
    output, sums = attention(q, k, v, 0.3, visible)
    ours = attention_gradients(cotangent, output, sums, q, k, v, 0.3, visible)
    pairs = zip("oqkv", (output, *ours), (expected, *gradients), strict=True)
    return [name for name, one, other in pairs if not _close(one, other)]


def _close(one: np.ndarray, other: mx.array) -> bool:
    return np.allclose(one, np.array(other), atol=2e-6 * max(1, np.abs(one).max()), rtol=1e-5)


@pytest.mark.parametrize("length", [1, 5, 128, 300])
def test_causal_rows(length: int) -> None:
    assert not _differing(_inputs(2, 6, 2, length), Visible(causal=True), "causal")


def test_all_keys() -> None:
    assert not _differing(_inputs(2, 4, 4, 130), Visible(), None)


@pytest.mark.parametrize("heads", [1, 6])
@pytest.mark.parametrize("rows", [1, 2])
def test_masks(rows: int, heads: int) -> None:
    rng = np.random.default_rng(1)
    mask = (rng.random((rows, heads, 140, 140)) < 0.5) | np.eye(140, dtype=bool)
    inputs = _inputs(2, 6, 2, 140)
    assert not _differing(inputs, Visible(mask=mask), mx.array(mask.astype(np.int32)) != 0)
    numbers = np.where(mask, rng.normal(size=mask.shape), -1e9).astype(np.float32)
    assert not _differing(inputs, Visible(mask=numbers), mx.array(numbers))


def test_rows_that_share_beginnings() -> None:
    inputs = _inputs(1, 6, 3, _NODES[-1].end)
    assert not _differing(inputs, Visible(nodes=_NODES), "causal", _NODES)


def test_a_long_node_is_cut_into_tiles() -> None:
    from mlx_slim.models.prefix_attention import _Node as node

    nodes = [
        node(0, 200, 0, ()),
        node(200, 350, 200, ((0, 200),)),
        node(350, 352, 200, ((0, 200),)),
    ]
    assert not _differing(_inputs(1, 4, 2, 352), Visible(nodes=nodes), "causal", nodes)


def test_swiglu() -> None:
    rng = np.random.default_rng(0)
    gate, up, cotangent = (rng.normal(size=(3, 70_000)).astype(np.float32) for _ in range(3))
    gate *= 30
    result, sigmoids = swiglu(gate, up)
    ours = swiglu_gradients(cotangent, gate, up, sigmoids)
    (expected,), gradients = mx.vjp(
        activations.swiglu, [mx.array(gate), mx.array(up)], [mx.array(cotangent)]
    )
    for one, other in zip((result, *ours), (expected, *gradients), strict=True):
        np.testing.assert_allclose(one, np.array(other), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_comes_out_so_without_a_warning(value: float) -> None:
    q, k, v, cotangent = _inputs(1, 2, 1, 4)
    q[0, 0, 2] = value
    output, sums = attention(q, k, v, 0.3, Visible(causal=True))
    assert not np.isfinite(output[0, 0, 2]).all() and np.isfinite(output[0, 1]).all()
    by_q, _, _ = attention_gradients(cotangent, output, sums, q, k, v, 0.3, Visible(causal=True))
    assert not np.isfinite(by_q[0, 0, 2]).all()
    result, sigmoids = swiglu(np.full(3, -value, np.float32), np.ones(3, np.float32))
    swiglu_gradients(np.ones(3, np.float32), result, result, sigmoids)

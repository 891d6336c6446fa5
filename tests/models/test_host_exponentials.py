"""NumPy's exponentials in softmax, SwiGLU and log-sum-exp: MLX's values, on a CPU alone."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.models import activations, host_exponentials, logits
from mlx_slim.models.host_exponentials import host_exponentials as by_numpy
from mlx_slim.models.host_exponentials import in_use
from mlx_slim.runtime import on_gpu

pytestmark = pytest.mark.skipif(on_gpu(), reason="a GPU computes its own exponentials")


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_exponentials, "FEW", 0)


def test_few_numbers_stay_mlxs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_exponentials, "FEW", 12)
    with by_numpy():
        assert in_use(normal(3, 4)) and not in_use(normal(3, 3), normal(3, 4))
        assert not in_use(normal(3, 4).astype(mx.float16))
    assert not in_use(normal(3, 4))


@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 17)])
def test_mlxs_logsumexp_over_rows_is_numpys(shape: tuple[int, ...]) -> None:
    x = normal(*shape, scale=9.0)
    stock = mx.logsumexp
    calls = [{"axis": -1, "keepdims": True}, {"axis": -1}, {"axis": 0, "keepdims": True}, {}]
    expected = [np.array(mx.logsumexp(x, **call)) for call in calls]
    with by_numpy():
        ours = [np.array(mx.logsumexp(x, **call)) for call in calls]
        assert mx.logsumexp is not stock
    assert mx.logsumexp is stock
    for one, other in zip(ours, expected, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=2e-6)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)) * scale


def attend(mask: Any, shape: tuple[int, int, int, int, int], **named: Any) -> mx.array:
    rows, heads, of_keys, queries, keys = shape
    q, k, v = (
        normal(rows, count, length, 16, seed=seed, scale=2.0)
        for seed, (count, length) in enumerate([(heads, queries), (of_keys, keys), (of_keys, keys)])
    )
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask=mask, **named)


def masks(rows: int, heads: int, queries: int, keys: int) -> dict[str, Any]:
    seen = mx.random.bernoulli(0.7, (rows, 1, queries, keys), key=mx.random.key(9))
    seen = seen | (mx.arange(keys) == 0)
    return {
        "none": None,
        "causal": "causal",
        "row": seen,
        "added": mx.where(seen, 0.0, -1e4),
        "head": mx.concatenate([seen] * heads, axis=1),
        "head of all rows": mx.random.bernoulli(0.7, (heads, queries, keys), key=mx.random.key(8))
        | (mx.arange(keys) == 0),
        "shared": seen[0, 0],
    }


@pytest.mark.parametrize(
    "name", ["none", "causal", "row", "added", "head", "head of all rows", "shared"]
)
@pytest.mark.parametrize("shape", [(3, 6, 2, 5, 9), (1, 4, 4, 7, 7), (2, 4, 1, 1, 11)])
def test_attention_is_mlxs(name: str, shape: tuple[int, int, int, int, int]) -> None:
    rows, heads, _, queries, keys = shape
    mask = masks(rows, heads, queries, keys)[name]
    expected = attend(mask, shape)
    mx.eval(expected)
    with by_numpy():
        ours = attend(mask, shape)
    np.testing.assert_allclose(np.array(ours), np.array(expected), rtol=0, atol=2e-6)


def test_a_row_that_sees_nothing_is_mlxs() -> None:
    mask = mx.zeros((1, 1, 4, 4), dtype=mx.bool_)
    expected = np.array(attend(mask, (1, 2, 2, 4, 4)))
    with by_numpy():
        ours = np.array(attend(mask, (1, 2, 2, 4, 4)))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)


def test_swiglu_and_logsumexp_are_mlxs_far_from_zero_too() -> None:
    gate, up = normal(3, 70_001, scale=60.0), normal(3, 70_001, seed=1)
    swiglu: Any = activations.swiglu
    expected, sums = np.array(swiglu(gate, up)), np.array(logits.logsumexp(gate))
    with by_numpy():
        assert in_use(gate, up)
        ours, our_sums = host_exponentials.swiglu(gate, up), logits.logsumexp(gate)
    np.testing.assert_allclose(np.array(ours), expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(np.array(our_sums), sums, rtol=1e-6)
    transposed = gate.T  # rows that are not contiguous
    with by_numpy():
        again = host_exponentials.swiglu(transposed, up.T)
    assert mx.array_equal(again, ours.T)


def test_a_row_does_not_depend_on_the_others() -> None:
    scores = normal(40, 1031, scale=5.0)
    whole = host_exponentials.softmax(scores)
    for row in (0, 17, 39):
        assert mx.array_equal(host_exponentials.softmax(scores[row : row + 1])[0], whole[row])
    assert np.abs(np.array(whole, np.float64).sum(axis=-1) - 1).max() < 1e-6


def test_nothing_is_hidden() -> None:
    bad = normal(2, 8)
    bad[1, 3] = float("nan")
    with by_numpy():
        assert np.isnan(np.array(logits.logsumexp(bad))).tolist() == [[False], [True]]
    assert np.isnan(np.array(host_exponentials.softmax(bad)[1])).all()


def test_other_numbers_and_sinks_are_mlxs(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, calls = mx.fast.scaled_dot_product_attention, []
    monkeypatch.setattr(host_exponentials, "softmax", lambda scores: calls.append(1) or scores)
    with by_numpy(), by_numpy():
        half = normal(1, 2, 3, 16).astype(mx.bfloat16)
        assert not in_use(half)
        mx.fast.scaled_dot_product_attention(half, half, half, scale=1.0)
        attend("causal", (1, 2, 2, 3, 3), sinks=mx.zeros((2,)))
    assert not calls and mx.fast.scaled_dot_product_attention is stock
    assert not in_use(normal(2))

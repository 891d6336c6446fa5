"""Chunked log-probabilities equal the plain ones, values and gradients of any function of them."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_slim.models.logits import token_nll
from mlx_slim.runtime import to_float
from mlx_slim.training.log_probs import target_log_probs
from tests.training.test_losses import D, N, V, _head

KINDS = ("biased", "untied", "tied", "adapted", "quantized", "quantized-tied", "capped")


def _rows_function(values_N: mx.array) -> mx.array:
    """Not a sum: what a position weighs depends on the other positions."""
    first, second = values_N[: N // 2].sum(), values_N[N // 2 :].mean()
    return mx.log(1 + mx.exp(0.01 * first - second)) + 0.1 * (values_N[3] * values_N[4])


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [5, N])
def test_values_and_gradients_of_a_function_of_them(kind: str, chunk: int, trained: bool) -> None:
    head = _head(kind)
    if not trained or kind.startswith("quantized"):
        head.module.freeze()
    mx.random.seed(3)
    hidden_ND, targets_N = mx.random.normal((N, D)), mx.random.randint(0, V, (N,))

    def loss(chunked: bool):
        def value(hidden_ND: mx.array, parameters: dict) -> mx.array:
            head.module.update(parameters)
            if chunked:
                values_N = target_log_probs(hidden_ND, head, targets_N, chunk=chunk)
            else:
                values_N = -token_nll(head(hidden_ND), targets_N)
            return _rows_function(values_N)

        parameters = head.module.trainable_parameters()
        result = mx.value_and_grad(value, argnums=(0, 1))(hidden_ND, parameters)
        mx.eval(result)
        head.module.update(parameters)
        return result

    (value, (by_hidden, by_head)), (plain, (hidden, weights)) = loss(True), loss(False)
    assert abs(to_float(value - plain)) < 1e-5
    pairs = [(by_hidden, hidden)]
    expected = dict(tree_flatten(weights))
    got = dict(tree_flatten(by_head))
    assert got.keys() == expected.keys()
    pairs += [(got[name], expected[name]) for name in expected]
    for one, other in pairs:
        assert to_float(mx.abs(one - other).max()) <= 2e-5 * to_float(mx.abs(other).max())
    alone = target_log_probs(hidden_ND, head, targets_N, chunk=chunk, gradient=False)
    assert to_float(mx.abs(alone + token_nll(head(hidden_ND), targets_N)).max()) < 1e-5


def test_under_compile() -> None:
    head = _head("tied")
    hidden_ND, targets_N = mx.random.normal((N, D)), mx.random.randint(0, V, (N,))

    def value(hidden_ND: mx.array, weight: mx.array) -> mx.array:
        head.module.weight = weight
        return _rows_function(target_log_probs(hidden_ND, head, targets_N, chunk=8))

    weight = head.module["weight"]
    plain = mx.grad(value, argnums=(0, 1))
    expected = plain(hidden_ND, weight)
    got = mx.compile(plain)(hidden_ND, weight)
    for one, other in zip(got, expected, strict=True):
        assert to_float(mx.abs(one - other).max()) <= 1e-5 * to_float(mx.abs(other).max())
    head.module.weight = weight

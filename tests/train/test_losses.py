"""Chunked linear cross-entropy equals the plain one, value and gradients, for any head."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_slim.models.anatomy import Head
from mlx_slim.models.logits import token_nll
from mlx_slim.train.losses import chunk_size, cross_entropy_sum, linear_cross_entropy

N, D, V = 37, 64, 96


class AdaptedHead(nn.Module):
    """A head with a part of its own, like an adapter around ``lm_head``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, V, bias=False)
        self.linear.freeze()
        self.lora_a = mx.random.normal((D, 4)) * 0.1
        self.lora_b = mx.random.normal((4, V)) * 0.1

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + (x @ self.lora_a) @ self.lora_b


def _head(kind: str) -> Head:
    mx.random.seed(1)
    if kind == "tied":
        return Head(nn.Embedding(V, D), tied=True)
    if kind == "adapted":
        return Head(AdaptedHead(), tied=False)
    if kind == "quantized":
        head = nn.QuantizedLinear.from_linear(nn.Linear(D, V, bias=False), group_size=32, bits=4)
        return Head(head, tied=False)
    if kind == "quantized-tied":
        embedding = nn.QuantizedEmbedding.from_embedding(nn.Embedding(V, D), group_size=32, bits=4)
        return Head(embedding, tied=True)
    head = nn.Linear(D, V, bias=kind != "untied")
    if kind == "frozen":
        head.freeze()
    return Head(head, tied=False)


def _value_and_gradients(head: Head, hidden: mx.array, loss):
    def fn(parameters: dict, hidden: mx.array) -> mx.array:
        head.module.update(parameters)
        return loss(hidden)

    parameters = head.module.trainable_parameters()
    value, (by_head, by_hidden) = mx.value_and_grad(fn, argnums=(0, 1))(parameters, hidden)
    head.module.update(parameters)
    return value, dict(tree_flatten(by_head)), by_hidden


KINDS = ["untied", "biased", "frozen", "tied", "quantized", "quantized-tied", "adapted"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 5, 37, 1000])
def test_chunked_equals_plain(kind: str, chunk: int) -> None:
    head = _head(kind)
    hidden = mx.random.normal((N, D))
    targets = mx.random.randint(0, V, (N,))
    plain = _value_and_gradients(head, hidden, lambda h: 2 * cross_entropy_sum(head(h), targets))
    ours = _value_and_gradients(
        head, hidden, lambda h: 2 * linear_cross_entropy(h, targets, head, chunk=chunk)
    )
    assert ours[0].item() == pytest.approx(plain[0].item(), rel=1e-5)
    assert mx.allclose(ours[2], plain[2], rtol=1e-4, atol=1e-5)
    assert set(ours[1]) == set(plain[1])
    for path, value in plain[1].items():
        assert mx.allclose(ours[1][path], value, rtol=1e-4, atol=1e-4), path
    forward = linear_cross_entropy(hidden, targets, head, chunk=chunk, gradient=False)
    assert 2 * forward.item() == pytest.approx(plain[0].item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_count_a_target_as_often_as_they_say(kind: str) -> None:
    head = _head(kind)
    hidden = mx.random.normal((N, D))
    targets = mx.random.randint(0, V, (N,))
    weights = mx.array([0.0, 1.0, 0.5, 2.0] * N)[:N]
    plain = _value_and_gradients(
        head, hidden, lambda h: (weights * token_nll(head(h), targets)).sum()
    )

    def loss(hidden: mx.array, gradient: bool = True) -> mx.array:
        return linear_cross_entropy(
            hidden, targets, head, chunk=5, gradient=gradient, weights_N=weights
        )

    ours = _value_and_gradients(head, hidden, loss)
    assert ours[0].item() == pytest.approx(plain[0].item(), rel=1e-5)
    assert loss(hidden, gradient=False).item() == pytest.approx(plain[0].item(), rel=1e-5)
    assert mx.allclose(ours[2], plain[2], rtol=1e-4, atol=1e-5)
    assert not ours[2][0].any().item()
    for path, value in plain[1].items():
        assert mx.allclose(ours[1][path], value, rtol=1e-4, atol=1e-4), path


def test_loss_survives_logits_that_overflow_exp() -> None:
    head = Head(nn.Linear(D, V, bias=False), tied=False)
    hidden = 1e4 * mx.random.normal((N, D))
    targets = mx.random.randint(0, V, (N,))
    value, _, gradient = _value_and_gradients(
        head, hidden, lambda h: linear_cross_entropy(h, targets, head, chunk=8)
    )
    assert mx.isfinite(value).item()
    assert mx.isfinite(gradient).all().item()


def test_only_one_chunk_of_logits_is_alive() -> None:
    rows, vocabulary, chunk = 4096, 4096, 64
    head = Head(nn.Linear(D, vocabulary, bias=False), tied=False)
    head.module.freeze()
    hidden = mx.random.normal((rows, D))
    targets = mx.random.randint(0, vocabulary, (rows,))
    mx.eval(hidden, targets, head.module.parameters())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    gradient = mx.grad(lambda h: linear_cross_entropy(h, targets, head, chunk=chunk))(hidden)
    mx.eval(gradient)
    all_logits = rows * vocabulary * 4
    assert mx.get_peak_memory() - before < all_logits / 4


def test_chunk_size_bounds_the_logits() -> None:
    assert chunk_size(49152, None) * 49152 <= 1 << 24
    assert chunk_size(32000, 7) == 7

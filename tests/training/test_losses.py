"""Chunked linear cross-entropy equals the plain one, value and gradients, for any head."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_slim.models.logits import token_nll
from mlx_slim.models.structure import Head
from mlx_slim.training import losses
from mlx_slim.training.losses import (
    NLL,
    TokenLoss,
    cross_entropy_sum,
    linear_cross_entropy,
    linear_loss,
)
from tests.support.memory import reset_peak

N, D, V = 37, 64, 96


class AdaptedHead(nn.Module):
    """A head with a part of its own, like an adapter around ``lm_head``."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.linear = nn.Linear(D, vocabulary, bias=False)
        self.linear.freeze()
        self.lora_a = mx.random.normal((D, 4)) * 0.1
        self.lora_b = mx.random.normal((4, vocabulary)) * 0.1

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + (x @ self.lora_a) @ self.lora_b


def _head(kind: str, vocabulary: int = V) -> Head:
    mx.random.seed(1)
    if kind == "tied":
        return Head(nn.Embedding(vocabulary, D), tied=True)
    if kind == "adapted":
        return Head(AdaptedHead(vocabulary), tied=False)
    if kind == "quantized":
        head = nn.QuantizedLinear.from_linear(
            nn.Linear(D, vocabulary, bias=False), group_size=32, bits=4
        )
        return Head(head, tied=False)
    if kind == "quantized-tied":
        embedding = nn.QuantizedEmbedding.from_embedding(
            nn.Embedding(vocabulary, D), group_size=32, bits=4
        )
        return Head(embedding, tied=True)
    if kind == "capped":
        return Head(nn.Embedding(vocabulary, D), tied=True, cap=2.0)
    head = nn.Linear(D, vocabulary, bias=kind != "untied")
    if kind.startswith("frozen"):
        head.freeze()
    return Head(head, tied=False, cap=0.5 if kind == "frozen-capped" else None)


def _value_and_gradients(head: Head, hidden: mx.array, loss: Callable[[mx.array], mx.array]) -> Any:
    def fn(parameters: dict, hidden: mx.array) -> mx.array:
        head.module.update(parameters)
        return loss(hidden)

    parameters = head.module.trainable_parameters()
    value, (by_head, by_hidden) = mx.value_and_grad(fn, argnums=(0, 1))(parameters, hidden)
    head.module.update(parameters)
    return value, dict(tree_flatten(by_head)), by_hidden


KINDS = ["untied", "biased", "frozen", "tied", "quantized", "quantized-tied", "adapted"]
KINDS += ["capped", "frozen-capped"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 5, 37, 1000])
def test_chunked_equals_plain(kind: str, chunk: int) -> None:
    check_equals_plain(kind, chunk)


def check_equals_plain(kind: str, chunk: int) -> None:
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
    before = reset_peak()
    gradient = mx.grad(lambda h: linear_cross_entropy(h, targets, head, chunk=chunk))(hidden)
    mx.eval(gradient)
    all_logits = rows * vocabulary * 4
    assert mx.get_peak_memory() - before < all_logits / 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [5, 1000])
def test_what_a_gpu_computes_equals_plain(kind: str, chunk: int, as_on_gpu: None) -> None:
    check_equals_plain(kind, chunk)


ROWS, CHUNK, VOCABULARY = 1024, 32, 2048


def peak_in_chunks(
    head: Head,
    token_loss: TokenLoss,
    columns: tuple[mx.array, ...],
    rows: int,
    compiled: bool,
    gradient: bool,
) -> float:
    """Return the memory that a loss needs besides its inputs, in float32 chunks of logits."""
    hidden = mx.random.normal((rows, D))
    columns = tuple(column[:rows] for column in columns)
    parameters = head.module.trainable_parameters()
    mx.eval(hidden, columns, head.module.parameters())

    def loss(parameters: dict, hidden: mx.array, *columns: mx.array) -> mx.array:
        head.module.update(parameters)
        sums = linear_loss(hidden, head, token_loss, columns, chunk=CHUNK, gradient=gradient)
        return sums.reshape(-1)[0]

    function = mx.value_and_grad(loss, argnums=(0, 1)) if gradient else loss
    if compiled:
        function = mx.compile(function)
    before = reset_peak()
    mx.eval(function(parameters, hidden, *columns))
    head.module.update(parameters)
    return (mx.get_peak_memory() - before) / (CHUNK * head.vocabulary * 4)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("kind", ["untied", "frozen", "quantized", "adapted"])
@pytest.mark.parametrize("gpu", [True, False])
def test_the_peak_does_not_grow_with_the_rows(
    kind: str, gpu: bool, gradient: bool, request: pytest.FixtureRequest
) -> None:
    check_the_peak(kind, NLL(), gradient, False, gpu, request)


@pytest.mark.parametrize("kind", ["untied", "quantized", "adapted"])
def test_nor_does_that_of_a_compiled_step(kind: str, request: pytest.FixtureRequest) -> None:
    check_the_peak(kind, NLL(), True, True, True, request)


def check_the_peak(
    kind: str,
    token_loss: TokenLoss,
    gradient: bool,
    compiled: bool,
    gpu: bool,
    request: pytest.FixtureRequest,
    *columns: mx.array,
) -> None:
    """A chunk is alive in a few copies, and MLX's CPU backend allocates ten operations ahead.

    A trained head's gradient (two chunks of these sizes) and another student's logits come on top.
    """
    if gpu:
        request.getfixturevalue("as_on_gpu")
    head = _head(kind, VOCABULARY)
    columns = (mx.random.randint(0, VOCABULARY, (ROWS,)), *columns)
    few, many = (
        peak_in_chunks(head, token_loss, columns, rows, compiled, gradient)
        for rows in (ROWS // 4, ROWS)
    )
    assert many < few + 4  # of the 24 chunks that come to it
    assert many < 30


def test_the_worked_example_of_the_logits_gradient_is_what_the_code_computes() -> None:
    (example,) = doctest.DocTestFinder().find(losses.LogitsGradient, globs=dict(vars(losses)))[:1]
    failed, attempted = doctest.DocTestRunner().run(example)
    assert (failed, attempted) == (0, 8)


def test_the_worked_example_is_the_derivative_of_the_loss() -> None:
    """The numbers of the docstring once more, by automatic differentiation."""
    logits_CV, targets_C = mx.log(mx.array([[1.0, 3.0], [1.0, 4.0]])), mx.array([0, 1])

    def loss(logits_CV: mx.array) -> mx.array:
        return NLL().value(logits_CV, targets_C, mx.array([1.0, 2.0]))

    assert mx.allclose(mx.grad(loss)(logits_CV), mx.array([[-0.75, 0.75], [0.4, -0.4]]), atol=1e-6)

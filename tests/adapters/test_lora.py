"""LoRA: nothing changes at the start, the update has the rank and the gradients of its formula."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_slim.adapters.lora import Adapter, LoRAEmbedding, LoRALinear, dimensions
from mlx_slim.models.structure import Head
from mlx_slim.runtime import to_float
from mlx_slim.training.grad_checkpoint import checkpointed
from mlx_slim.training.losses import linear_cross_entropy
from tests.adapters.support import dense, linear, relative_error, shake

WIDTHS = [None, 2, 3, 4, 5, 6, 8]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("bias", [True, False])
def test_dimensions_and_output_at_the_start(bits: int | None, bias: bool) -> None:
    base = linear(128, 96, bias=bias, bits=bits)
    assert dimensions(base) == (128, 96)
    x = mx.random.normal((2, 7, 128))
    adapter = LoRALinear(base, 8, 2.0)
    assert adapter.lora_a.shape == (128, 8)
    assert adapter.lora_b.shape == (8, 96)
    assert mx.array_equal(adapter(x), base(x))
    assert mx.abs(adapter.lora_a).max().item() <= 128**-0.5
    assert adapter.lora_a.std().item() == pytest.approx((3 * 128) ** -0.5, rel=0.1)


@pytest.mark.parametrize("bits", WIDTHS)
def test_embedding_at_the_start_and_as_a_head(bits: int | None) -> None:
    base: nn.Module = nn.Embedding(100, 64)
    if bits:
        base = base.to_quantized(64, bits)
    assert dimensions(base) == (100, 64)
    base.freeze()
    adapter = LoRAEmbedding(base, 8, 2.0)
    ids, x = mx.array([[3, 99, 0]]), mx.random.normal((2, 3, 64))
    assert mx.array_equal(adapter(ids), base(ids))
    assert mx.array_equal(adapter.as_linear(x), base.as_linear(x))
    shake(adapter)
    merged = adapter.merged_weight()
    assert relative_error(adapter(ids), merged[ids]) < 1e-5
    assert relative_error(adapter.as_linear(x), x @ merged.T) < 1e-5


@pytest.mark.parametrize("bits", [None, 4])
def test_update_is_the_formula_and_has_rank_r(bits: int | None) -> None:
    base = linear(128, 96, bias=True, bits=bits)
    adapter = LoRALinear(base, 4, 3.0)
    shake(adapter)
    weight = dense(base)
    delta = 3.0 * adapter.lora_b.T @ adapter.lora_a.T
    x = mx.random.normal((5, 128))
    assert relative_error(adapter(x), x @ (weight + delta).T + base["bias"]) < 1e-5
    assert relative_error(adapter.merged_weight(), weight + delta) < 1e-6
    assert np.linalg.matrix_rank(np.array(adapter.merged_weight() - weight), tol=1e-3) == 4


def test_gradients_at_the_start_and_of_the_formula() -> None:
    base = linear(64, 48, bias=True, bits=None)
    adapter = LoRALinear(base, 4, 2.0)
    x, target = mx.random.normal((3, 6, 64)), mx.random.normal((3, 6, 48))

    def loss(a: mx.array, b: mx.array) -> mx.array:
        adapter.lora_a, adapter.lora_b = a, b
        return ((adapter(x) - target) ** 2).sum()

    def slow(a: mx.array, b: mx.array) -> mx.array:
        weight = base["weight"] + 2.0 * (a @ b).T
        return ((x @ weight.T + base["bias"] - target) ** 2).sum()

    grad_a, grad_b = mx.grad(loss, argnums=(0, 1))(adapter.lora_a, adapter.lora_b)
    assert mx.all(grad_a == 0)
    assert to_float(mx.linalg.norm(grad_b)) > 1
    shake(adapter)
    factors = adapter.lora_a, adapter.lora_b
    for value, expected in zip(
        mx.grad(loss, argnums=(0, 1))(*factors),
        mx.grad(slow, argnums=(0, 1))(*factors),
        strict=True,
    ):
        assert relative_error(value, expected) < 1e-4


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_parameters_stay_float32_over_a_16_bit_base(dtype: mx.Dtype) -> None:
    base = linear(64, 48, bias=True, bits=None)
    base.set_dtype(dtype)
    adapter = LoRALinear(base, 4, 2.0)
    x = mx.random.normal((5, 64)).astype(dtype)
    assert adapter(x).dtype == dtype
    assert mx.array_equal(adapter(x), base(x))
    shake(adapter)
    assert adapter.lora_a.dtype == adapter.lora_b.dtype == mx.float32
    expected = x.astype(mx.float32) @ adapter.merged_weight().T + base["bias"].astype(mx.float32)
    assert adapter(x).dtype == dtype
    assert relative_error(adapter(x).astype(mx.float32), expected) < 0.02
    grad = mx.grad(lambda a: (setattr(adapter, "lora_a", a) or adapter(x)).sum())(adapter.lora_a)
    assert grad.dtype == mx.float32


def test_dropout_only_in_training_and_unbiased() -> None:
    base = linear(64, 48, bias=False, bits=None)
    adapter = LoRALinear(base, 4, 2.0, dropout=0.25)
    shake(adapter)
    x = mx.random.normal((2, 64))
    adapter.eval()
    plain = adapter(x)
    assert relative_error(plain, x @ adapter.merged_weight().T) < 1e-5
    adapter.train()
    mean = mx.mean(mx.stack([adapter(x) - base(x) for _ in range(2000)]), axis=0)
    assert relative_error(mean, plain - base(x)) < 0.05


def test_the_chunked_loss_through_a_head_with_dropout_has_its_own_gradient() -> None:
    base = linear(32, 40, bias=False, bits=None)
    head = LoRALinear(base, 4, 2.0, dropout=0.5)
    shake(head)
    hidden, targets = mx.random.normal((10, 32)), mx.arange(10)
    start = head.lora_a

    def loss(a: mx.array) -> mx.array:
        head.lora_a = a
        mx.random.seed(3)
        return linear_cross_entropy(hidden, targets, Head(head, tied=False), chunk=4)

    grad = mx.grad(loss)(start)
    direction = grad / mx.linalg.norm(grad)
    derivative = (loss(start + 1e-2 * direction) - loss(start - 1e-2 * direction)).item() / 2e-2
    assert derivative == pytest.approx(mx.linalg.norm(grad).item(), rel=0.02)


class Block(nn.Module):
    def __init__(self, inner: Adapter) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, x: mx.array) -> mx.array:
        return self.inner(self.inner(x))


def test_checkpointed_dropout_has_the_gradient_of_its_own_forward_pass() -> None:
    base = linear(32, 32, bias=False, bits=None)
    block = Block(LoRALinear(base, 4, 2.0, dropout=0.5))
    shake(block)
    block.train()
    x = mx.random.normal((5, 32))

    def loss(step: float, direction: mx.array) -> float:
        block.inner.lora_a = start + step * direction
        mx.random.seed(3)
        return to_float((block(x) ** 2).sum())

    start = block.inner.lora_a
    with checkpointed([block]):
        mx.random.seed(3)
        grad = nn.value_and_grad(block, lambda m: (m(x) ** 2).sum())(block)[1]["inner"]["lora_a"]
        direction = grad / mx.linalg.norm(grad)
        derivative = (loss(1e-3, direction) - loss(-1e-3, direction)) / 2e-3
    assert derivative == pytest.approx(mx.linalg.norm(grad).item(), rel=0.02)

"""The CPU forward of quantized layers: same numbers and parameters, no dense weight kept."""

from __future__ import annotations

import shutil
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

from mlx_slim.models import quantized
from mlx_slim.models.dequantize import dequantize
from mlx_slim.runtime import on_gpu, to_float
from tests.support.memory import reset_peak

pytestmark = pytest.mark.skipif(on_gpu(), reason="nothing is replaced on a GPU")

FORMATS = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
FORMATS += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


def _layer(mode: str, bits: int, group: int, *, bias: bool = True, dtype: Any = mx.float32) -> Any:
    mx.random.seed(bits)
    dense = nn.Linear(128, 96, bias=bias)
    dense.set_dtype(dtype)
    return nn.QuantizedLinear.from_linear(dense, group, bits, mode)


def _close(a: mx.array, b: mx.array, tolerance: float = 1e-5) -> bool:
    scale = to_float(mx.abs(b.astype(mx.float32)).max())
    gap = to_float(mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max())
    return gap <= tolerance * scale


@pytest.mark.parametrize(("mode", "bits", "group"), FORMATS)
def test_same_output_and_gradient(mode: str, bits: int, group: int) -> None:
    layer = _layer(mode, bits, group)
    x = mx.random.normal((2, 9, 128))
    plain = layer(x)
    slow_gradient = mx.grad(lambda x: mx.sin(layer(x)).sum())(x)
    assert quantized.use_fast_matmul(layer) == 1
    assert quantized.use_fast_matmul(layer) == 0
    assert isinstance(layer, nn.QuantizedLinear)
    fast = layer(x)
    assert fast.dtype == plain.dtype and fast.shape == plain.shape
    assert _close(fast, plain)
    assert _close(mx.grad(lambda x: mx.sin(layer(x)).sum())(x), slow_gradient)
    assert _close(layer(x[:1, :1]), plain[:1, :1])


@pytest.mark.parametrize(("mode", "bits", "group"), FORMATS)
def test_dense_weight_is_that_of_mlx(mode: str, bits: int, group: int) -> None:
    layer = _layer(mode, bits, group)
    expected = mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        group_size=group,
        bits=bits,
        mode=mode,
        dtype=mx.float32,
    )
    dense = quantized.dequantize_weight(layer)
    assert dense.dtype == mx.float32 and dense.shape == (96, 128)
    assert mx.array_equal(dense, expected)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_every_code_of_a_float_format(mode: str) -> None:
    bits, group = (8, 32) if mode == "mxfp8" else (4, 16 if mode == "nvfp4" else 32)
    codes = [code for code in range(256) if bits == 4 or code & 127 != 127]  # 127 is NaN
    codes += codes[: -len(codes) % 128]
    weight = mx.array(codes, mx.uint8).view(mx.uint32)[None]
    groups = weight.size * 32 // bits // group
    for scale in (1, 40, 126 if mode == "nvfp4" else 130):
        options = {"group_size": group, "bits": bits, "mode": mode}
        scales = mx.full((1, groups), scale, mx.uint8)
        expected = mx.dequantize(weight, scales, dtype=mx.float32, **options)
        assert mx.array_equal(dequantize(weight, scales, None, **options), expected)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_sixteen_bit_activations(dtype: mx.Dtype) -> None:
    layer = _layer("affine", 4, 64, dtype=dtype)
    x = mx.random.normal((8, 128)).astype(dtype)
    plain = layer(x)
    quantized.use_fast_matmul(layer)
    assert layer(x).dtype == plain.dtype == dtype
    assert _close(layer(x), plain, 2e-2)


def test_embedding_head_and_tied_gradient() -> None:
    embedding = nn.QuantizedEmbedding(96, 128)
    x = mx.random.normal((7, 128))
    head, rows = embedding.as_linear(x), embedding(mx.array([3, 5]))
    gradient = mx.grad(lambda x: mx.sin(embedding.as_linear(x)).sum())(x)
    assert quantized.use_fast_matmul(embedding) == 1
    assert _close(embedding.as_linear(x), head)
    assert mx.array_equal(embedding(mx.array([3, 5])), rows)
    assert _close(mx.grad(lambda x: mx.sin(embedding.as_linear(x)).sum())(x), gradient)
    assert _close(x @ quantized.dequantize_weight(embedding).T, head)


def _shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    weights: dict[str, mx.array] = dict(tree_flatten(layer.parameters()))
    return {key: value.shape for key, value in weights.items()}


def test_parameters_and_adapters_are_unchanged() -> None:
    layer, embedding = _layer("affine", 4, 64), nn.QuantizedEmbedding(96, 128)
    before = _shapes(layer)
    trainable = [key for key, _ in tree_flatten(layer.trainable_parameters())]
    quantized.use_fast_matmul(layer)
    quantized.use_fast_matmul(embedding)
    assert _shapes(layer) == before
    assert [key for key, _ in tree_flatten(layer.trainable_parameters())] == trainable
    adapter = LoRALinear.from_base(layer, r=4)
    assert adapter.lora_a.shape == (128, 4) and adapter.lora_b.shape == (4, 96)
    x = mx.random.normal((5, 128))
    assert mx.array_equal(adapter(x), layer(x))
    assert isinstance(adapter.fuse(), nn.QuantizedLinear)
    base: Any = embedding  # mlx-lm names only the dense one
    assert LoRAEmbedding.from_base(base, r=4).lora_b.shape == (4, 128)


def test_classes_are_left_alone() -> None:
    forward = nn.QuantizedLinear.__call__
    layer, other = _layer("affine", 4, 64), _layer("affine", 4, 64)
    quantized.use_fast_matmul(layer)
    assert nn.QuantizedLinear.__call__ is forward
    assert type(other) is nn.QuantizedLinear


class _Stack(nn.Module):
    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, 1)
        self.layers = [nn.QuantizedLinear(width, width, bias=False) for _ in range(depth)]
        for layer in self.layers:
            layer.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.first(x)
        for layer in self.layers:
            x = nn.tanh(layer(x))
        return x


def _stack(depth: int, width: int = 256) -> _Stack:
    mx.random.seed(0)
    stack = _Stack(depth, width)
    mx.eval(stack.parameters())
    return stack


def test_no_dense_weight_is_kept() -> None:
    """The peak of a training step must not grow by a dense weight for each layer."""

    def peak(depth: int) -> int:
        width = 512
        stack = _stack(depth, width)
        assert quantized.use_fast_matmul(stack) == depth
        x = mx.random.normal((4, width))
        mx.eval(x)
        step = nn.value_and_grad(stack, lambda x: stack(x).sum())
        before = reset_peak()
        mx.eval(step(x))
        return mx.get_peak_memory() - before

    dense = 4 * 512 * 512
    assert peak(24) - peak(6) < 2 * dense


@pytest.mark.parametrize("rows", [4, 16, 60])
@pytest.mark.parametrize(("mode", "bits", "group"), FORMATS)
def test_pieces_of_a_weight_give_the_same(
    mode: str, bits: int, group: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = nn.QuantizedLinear(256, 5000, bias=True, group_size=group, bits=bits, mode=mode)
    x = mx.random.normal((rows, 256))
    quantized.use_fast_matmul(layer)
    whole, gradient = layer(x), mx.grad(lambda x: mx.sin(layer(x)).sum())(x)
    mx.eval(whole, gradient)
    monkeypatch.setattr(quantized, "PIECE_BYTES", 4 * 256 * 2100)  # 2,048 rows, and 904 at the end
    assert _close(layer(x), whole, 1e-6)
    assert _close(mx.grad(lambda x: mx.sin(layer(x)).sum())(x), gradient)


def test_a_head_is_rebuilt_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    width, outputs = 256, 32_768
    layer = nn.QuantizedLinear(width, outputs, bias=False)
    x = mx.random.normal((8, width))
    quantized.use_fast_matmul(layer)
    mx.eval(layer.parameters(), x)

    def peak() -> int:
        before = reset_peak()
        mx.eval(layer(x))
        return mx.get_peak_memory() - before

    dense = 4 * width * outputs
    assert peak() >= dense
    monkeypatch.setattr(quantized, "PIECE_BYTES", dense // 64)
    assert peak() <= 0.5 * dense  # some operations are in flight, each with its array


def test_checkpointed_step_agrees() -> None:
    stack = _stack(3)
    x = mx.random.normal((6, 256))
    step = nn.value_and_grad(stack, lambda x: mx.square(stack(x)).sum())
    _, expected = step(x)
    quantized.use_fast_matmul(stack)
    _, plain = step(x)

    def checkpointed_loss(x: mx.array) -> mx.array:
        def run(parameters: dict, x: mx.array) -> mx.array:
            stack.update(parameters)
            return stack(x)

        return mx.square(mx.checkpoint(run)(stack.trainable_parameters(), x)).sum()

    _, checkpointed = nn.value_and_grad(stack, checkpointed_loss)(x)
    for gradients in (plain, checkpointed):
        assert _close(gradients["first"]["weight"], expected["first"]["weight"], 1e-4)


@pytest.mark.skipif(shutil.which("c++") is None, reason="mx.compile needs a C++ compiler on a CPU")
def test_compiled_step_agrees() -> None:
    stack = _stack(3)
    quantized.use_fast_matmul(stack)
    step = nn.value_and_grad(stack, lambda x: mx.square(stack(x)).sum())
    compiled = mx.compile(step)
    for key in (1, 2):  # the second call reuses the trace
        x = mx.random.normal((6, 256), key=mx.random.key(key))
        (loss, gradients), (expected, plain) = compiled(x), step(x)
        assert _close(loss, expected)
        assert _close(gradients["first"]["weight"], plain["first"]["weight"])


def test_scales_that_learn_get_gradients() -> None:
    layer = _layer("affine", 4, 64)
    x = mx.random.normal((5, 128))
    layer.unfreeze(keys=["scales", "biases"])
    expected = nn.value_and_grad(layer, lambda x: mx.sin(layer(x)).sum())(x)[1]
    quantized.use_fast_matmul(layer)
    gradients = nn.value_and_grad(layer, lambda x: mx.sin(layer(x)).sum())(x)[1]
    assert set(gradients) == {"scales", "biases", "bias"}
    for name, value in gradients.items():
        assert _close(value, expected[name], 1e-4)


def test_densify_gives_the_same_outputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.QuantizedEmbedding(96, 128)
            self.layer = _layer("affine", 4, 64)
            self.norm = nn.RMSNorm(128)

        def __call__(self, x: Any) -> Any:
            return self.layer(self.norm(self.embed(x)))

    model = Model()
    tokens = mx.array([[1, 2, 3, 4]])
    before = model(tokens)
    assert quantized.is_quantized(model)
    assert quantized.densify(model) == 2
    assert not quantized.is_quantized(model)
    assert type(model.layer) is nn.Linear and type(model.embed) is nn.Embedding
    assert _close(model(tokens), before)
    assert "bias" in model.layer and "weight" in model.embed

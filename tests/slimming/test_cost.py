"""Counted costs against those of models that are made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_slim.errors import SlimError
from mlx_slim.evaluation.scoring.answer_cache import footprint
from mlx_slim.models.kv_cache import quantize_cache
from mlx_slim.models.load import load, read_config
from mlx_slim.quantization.options import CompressOptions
from mlx_slim.quantization.run import compress
from mlx_slim.slimming.candidate import Cost, format_of
from mlx_slim.slimming.cost import cost, other_bytes
from tests.support.tiny import tiny_model


def counted(model: Path, bits: int | None, context: int = 512, kv_bits: int | None = None) -> Cost:
    return cost(
        read_config(model),
        mx.float32,
        None if bits is None else format_of(bits),
        context=context,
        kv_bits=kv_bits,
        others=other_bytes(model),
    )


@pytest.mark.parametrize(("architecture", "bits"), [("llama", 4), ("qwen2", 3), ("phi", 8)])
def test_bytes_are_those_of_the_folder(
    tiny: Callable[[str], Path], tmp_path: Path, architecture: str, bits: int
) -> None:
    out = tmp_path / "out"
    compress(tiny(architecture), out, CompressOptions(format_of(bits), fidelity_samples=0))
    tensors = sum(
        value.nbytes
        for file in out.glob("*.safetensors")
        for value in mx.load(str(file)).values()  # pyright: ignore
    )
    one = counted(tiny(architecture), bits)
    assert one.weight_bytes == tensors
    size = sum(path.stat().st_size for path in out.iterdir())
    assert one.disk_bytes == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize(("width", "bits"), [(64, 4.5), (32, 5.0)])
def test_cache_is_that_of_mlx_lm(tmp_path: Path, width: int, bits: float) -> None:
    folder = tiny_model(tmp_path / "m", head_dim=width)
    model = load(folder, dtype=mx.bfloat16).model
    real = footprint(model).cache_bytes(700)
    assert counted(folder, None, context=700).cache_bytes == real
    # 4 bits, and 16 + 16 bits of scale and bias for 64 numbers, or for the 32 of a narrow head
    quantized = counted(folder, None, 700, 4).cache_bytes
    assert quantized == pytest.approx(real * bits / 16, abs=1)
    quantize_cache(model, 4)
    assert quantized == footprint(model).cache_bytes(700)


# The first stores a latent and a rotary key; the class of the second has heads of 256 by default.
@pytest.mark.parametrize("architecture", ["deepseek_v3", "gemma3_text"])
def test_what_is_cached_is_looked_at(tmp_path: Path, architecture: str) -> None:
    folder = tiny_model(tmp_path / "m", architecture, head_dim=256, sliding_window=512)
    model = load(folder, dtype=mx.bfloat16).model
    caches = make_prompt_cache(model)
    model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
    each = [sum(x.nbytes // 256 for x in (c.keys, c.values)) for c in caches]  # 256 tokens a step
    tokens = [min(getattr(cache, "max_size", 1024), 1024) for cache in caches]
    config = {key: value for key, value in read_config(folder).items() if key != "head_dim"}
    one = cost(config, mx.float32, None, context=1000, kv_bits=None, others=0)
    assert one.cache_bytes == sum(size * n for size, n in zip(each, tokens, strict=True))


def test_a_cache_that_cannot_be_quantized_is_not_counted_as_if(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "gemma3_text", head_dim=32)
    with pytest.raises(SlimError, match="cannot keep its cache in 4 bits: it is a Rotating"):
        counted(folder, 4, kv_bits=4)


def test_fewer_bits_and_shorter_contexts_cost_less(tiny: Callable[..., Path]) -> None:
    sizes = [counted(tiny(), bits).memory_bytes for bits in (None, 8, 6, 5, 4, 3, 2)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert counted(tiny(), 4, 4096).memory_bytes > counted(tiny(), 4, 512).memory_bytes

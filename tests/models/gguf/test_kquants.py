"""K blocks hold what ``gguf.dequantize`` reads, and round as finely as llama.cpp's own."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from mlx_slim.models.gguf import kquants
from mlx_slim.models.gguf.kquants import pack_q6_k, pack_q45_k, quantize_k

# ‖error‖ / ‖w‖ of llama.cpp's quantizer on Gaussian weights; tests/parity/test_kquants.py runs it.
THEIRS = {"Q4_K": 0.0713, "Q5_K": 0.0361, "Q6_K": 0.01772}


def _read(blocks: np.ndarray, kind: str) -> np.ndarray:
    return dequantize(blocks, GGMLQuantizationType[kind])


def _error(weight: np.ndarray, kind: str) -> float:
    value = _read(quantize_k(weight, kind), kind)
    return float(np.linalg.norm(value - weight) / np.linalg.norm(weight))


def _gaussian(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize(("kind", "levels"), [("Q4_K", 15), ("Q5_K", 31)])
def test_every_code_scale_and_offset_is_read_back(kind: str, levels: int) -> None:
    rng = np.random.default_rng(1)
    d, e = (rng.uniform(0.001, 1, 50).astype(np.float16) for _ in range(2))
    s, m = (rng.integers(0, 64, (50, 8), np.uint8) for _ in range(2))
    q = rng.integers(0, levels + 1, (50, 8, 32), np.uint8)
    blocks = pack_q45_k(d, e, s, m, q, levels)
    assert blocks.shape == (50, GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1])
    scale = (d.astype(np.float32)[:, None] * s)[..., None]
    offset = (e.astype(np.float32)[:, None] * m)[..., None]
    assert np.array_equal(_read(blocks, kind), (scale * q - offset).reshape(50, 256))


def test_every_code_and_scale_of_six_bits_is_read_back() -> None:
    rng = np.random.default_rng(1)
    d = rng.uniform(-1, 1, 50).astype(np.float16)
    s = rng.integers(-128, 128, (50, 16), np.int8)
    q = rng.integers(-32, 32, (50, 16, 16), np.int8)
    blocks = pack_q6_k(d, s, q)
    assert blocks.shape == (50, 210)
    scale = (d.astype(np.float32)[:, None] * s)[..., None]
    assert np.array_equal(_read(blocks, "Q6_K"), (scale * q).reshape(50, 256))


@pytest.mark.parametrize("kind", THEIRS)
def test_rounds_as_finely_as_llama_cpp(kind: str) -> None:
    assert _error(_gaussian(256, 1024), kind) <= 1.05 * THEIRS[kind]
    assert _error(1e-3 * _gaussian(64, 1024) + 1e-3, kind) <= 1.05 * THEIRS[kind]


@pytest.mark.parametrize("kind", THEIRS)
def test_blocks_depend_on_their_own_weights_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = _gaussian(37, 512)
    whole = quantize_k(weight, kind)
    assert whole.shape == (37, 2 * GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1])
    assert np.array_equal(quantize_k(weight[20:21], kind), whole[20:21])
    monkeypatch.setattr(kquants, "_CHUNK", 5)
    monkeypatch.setattr(kquants.os, "cpu_count", lambda: 3)
    assert np.array_equal(quantize_k(weight, kind), whole)


@pytest.mark.parametrize("kind", THEIRS)
def test_odd_weights(kind: str) -> None:
    zeros = np.zeros((2, 256), np.float32)
    assert not _read(quantize_k(zeros, kind), kind).any()
    for value in (0.75, -0.75):
        assert _error(zeros + value, kind) < 0.02
    one = zeros.copy()
    one[0, 77] = -3.0
    assert np.allclose(_read(quantize_k(one, kind), kind), one, atol=0.02)
    sparse = np.where(_gaussian(4, 1024) > 2, _gaussian(4, 1024), 0)
    assert _error(sparse, kind) < 0.1
    positive = np.abs(_gaussian(4, 1024))
    assert _error(positive, kind) < 1.3 * THEIRS[kind]
    assert _error(-positive, kind) < 1.3 * THEIRS[kind]
    tail = _gaussian(4, 1024) ** 5  # a few are a thousand times as large as most
    assert _error(tail, kind) < 1.3 * THEIRS[kind]


def test_weights_on_the_grid_of_a_format_stay() -> None:
    for kind, least in (("Q4_K", 0.02), ("Q6_K", 0.01)):
        once = _read(quantize_k(_gaussian(16, 512), kind), kind)
        assert _error(once, kind) < least

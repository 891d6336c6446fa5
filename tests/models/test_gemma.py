"""Gemma 3's scale: exact in float32, the library's in 16 bits. Gemma 2's masks: one a row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.models.gemma import use_exact_scale, use_row_masks
from mlx_slim.models.load import load
from mlx_slim.models.structure import SegmentCache, supports_packing
from mlx_slim.runtime import to_float
from tests.support.stock import stock_load
from tests.support.tiny import tiny_model

SETTINGS = {
    "model_type": "gemma3_text",
    "head_dim": 16,
    "hidden_size": 40,  # its root is no bfloat16
    "query_pre_attn_scalar": 16,
    "sliding_window": 64,
    "sliding_window_pattern": 2,
    "rope_local_base_freq": 1e4,
}


class _Seen(Exception):
    pass


def _first_input(body: Any, ids: mx.array) -> mx.array:
    """Return what the first block is given."""

    class Catch:
        def __call__(self, x: Any, *_: Any) -> None:
            raise _Seen(x)

    body.layers = [Catch(), *body.layers[1:]]
    with pytest.raises(_Seen) as caught:
        body(ids)
    return caught.value.args[0]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_first_block_reads_embeddings_times_the_root(tmp_path: Path, dtype: Any) -> None:
    folder = tiny_model(tmp_path / "g", "llama", **SETTINGS)
    model: Any = load(folder, dtype=dtype).model
    assert not use_exact_scale(model, SETTINGS)  # loading did it
    ids = mx.array([[3, 1, 4]])
    weights = np.array(model.model.embed_tokens(ids).astype(mx.float32), dtype=np.float64)
    actual = np.array(_first_input(model.model, ids).astype(mx.float32))
    tolerance = 1e-6 if dtype == mx.float32 else 1e-2
    np.testing.assert_allclose(actual, weights * math.sqrt(40), rtol=tolerance)


def test_the_library_alone_is_off(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "g", "llama", **SETTINGS)
    stock, _ = stock_load(str(folder))
    ids = mx.array([[3, 1, 4, 1, 5]])
    ours = load(folder, dtype=mx.float32).model
    assert to_float(mx.abs(ours(ids) - stock(ids)).max()) > 0
    assert use_exact_scale(stock, SETTINGS)
    assert to_float(mx.abs(ours(ids) - stock(ids)).max()) < 1e-5


GEMMA_2 = {
    "model_type": "gemma2",
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


@pytest.mark.parametrize("rows", [2, 3])  # as many as key-value heads, and not
def test_gemma_2_keeps_packed_rows_apart(tmp_path: Path, rows: int) -> None:
    folder = tiny_model(tmp_path / "g", "llama", **GEMMA_2)
    model = load(folder, dtype=mx.float32).model
    assert not use_row_masks(model)  # loading did it
    tokens = mx.arange(12 * rows).reshape(rows, 12) % 23
    begins = [3 + 2 * row for row in range(rows)]
    segments = mx.array([[0] * begin + [1] * (12 - begin) for begin in begins])
    packed = model(tokens, [SegmentCache(segments)] * 3)
    for row, begin in enumerate(begins):
        alone = model(tokens[row : row + 1, begin:])[0]
        assert to_float(mx.abs(packed[row, begin:] - alone).max()) < 1e-4


def test_rows_that_the_library_alone_mixes_are_not_packed(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "g", "llama", **GEMMA_2)
    stock, _ = stock_load(str(folder))
    assert not supports_packing(stock)
    assert supports_packing(load(folder).model)

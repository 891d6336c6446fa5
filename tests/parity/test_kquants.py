"""K blocks beside llama.cpp's own quantizer, and files of each type run by llama.cpp itself.

The quantizer is called in the library of xllamacpp, block by block as ``llama-quantize`` calls it.
Needs xllamacpp: ``make parity``.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from mlx_slim.export.model import export_gguf
from mlx_slim.models.gguf.kquants import quantize_k
from mlx_slim.models.gguf.load import import_gguf
from tests.parity.llama_side import IDS, log_probabilities, xllamacpp
from tests.support.tiny import VOCAB, tiny_model

# llama.cpp rounds activations to 8 bits where weights are quantized: largest difference of
# log-probabilities that a random model's may have.
CLOSE = {"f16": 0.01, "f32": 0.001}
NEAR = 0.06


def quantized_there(weight: np.ndarray, kind: str) -> np.ndarray:
    """Return the blocks that llama.cpp makes of ``weight`` (R, C)."""
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    long = ctypes.c_int64
    quantize.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, long, long, long, ctypes.c_void_p),
    ]
    block = GGMLQuantizationType[kind]
    size, nbytes = GGML_QUANT_SIZES[block]
    rows, columns = weight.shape
    blocks = np.empty((rows, columns // size * nbytes), np.uint8)
    done = quantize(block, weight.ctypes.data, blocks.ctypes.data, 0, rows, columns, None)
    assert done == blocks.nbytes
    return blocks


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("shape", ["gaussian", "heavy", "shifted"])
def test_error_is_that_of_llama_cpp(kind: str, shape: str) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((128, 1024)).astype(np.float32)
    if shape == "heavy":
        weight = rng.standard_t(4, weight.shape).astype(np.float32) * 0.02
    if shape == "shifted":
        weight += 0.5

    def error(blocks: np.ndarray) -> float:
        value = dequantize(blocks, GGMLQuantizationType[kind])
        return float(np.linalg.norm(value - weight) / np.linalg.norm(weight))

    assert error(quantize_k(weight, kind)) <= 1.05 * error(quantized_there(weight, kind))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are multiples of 256; its tokenizer merges, as llama.cpp wants it."""
    folder = tmp_path_factory.mktemp("wide") / "wide"
    tiny_model(folder, hidden_size=256, intermediate_size=512)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["ab"] = VOCAB - 1
    content["model"]["merges"] = [["a", "b"]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "kind",
    [
        *("f32", "f16", "q8_0", "q6_k", "q5_k_m", "q5_k", "q5_1", "q5_0"),
        *("q4_k_m", "q4_k", "q4_1", "q4_0"),
    ],
)
def test_llama_cpp_runs_every_type(source: Path, tmp_path: Path, kind: str) -> None:
    export_gguf(source, tmp_path / "out", kind=kind)
    file = tmp_path / "out" / f"wide-{kind}.gguf"
    model: Any = import_gguf(file).model
    logits_V = np.array(model(mx.array([IDS]))[0, -1], np.float64)
    ours = logits_V - logits_V.max() - np.log(np.exp(logits_V - logits_V.max()).sum())
    theirs = log_probabilities(file, IDS)
    assert np.abs(ours - theirs).max() < CLOSE.get(kind, NEAR)
    assert np.std(ours) > 5 * NEAR  # the figures differ by more than the bound

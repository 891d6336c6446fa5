"""The same logits as llama.cpp itself, of a base and of base + adapter, in F32, within 0.05.

llama.cpp's server gives log-probabilities of the next token, here of the whole vocabulary: logits
but for one constant a position, which is what is compared. Of Gemma the gap is 0.008 (llama.cpp
looks GELU up in a float16 table), of all others 1e-5. Needs xllamacpp: ``make parity``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.adapters.store import load_adapter
from mlx_slim.export.gguf_adapter import export_gguf_adapter
from mlx_slim.models.gguf.load import import_gguf
from mlx_slim.models.load import load
from tests.parity.llama_side import IDS, log_probabilities
from tests.support.adapters import write_adapter
from tests.support.gguf_files import FAMILIES, family_model, write_family

CLOSE, CLOSE_GELU, MOVED = 1e-3, 0.05, 0.5
WINDOW = 4  # of the tiny Gemma 2, beyond which mlx-lm's class differs (its rows are limited)


def ours(model: Any, length: int) -> np.ndarray:
    """Return the log-probabilities (V,) of ``model`` after ``length`` of ``IDS``."""
    model.eval()
    logits_V = np.array(model(mx.array([IDS[:length]]))[0, -1], np.float64)
    return logits_V - np.log(np.exp(logits_V - logits_V.max()).sum()) - logits_V.max()


def gap(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest difference of two log-probabilities."""
    return float(np.abs(one - other).max())


SETTINGS: dict[str, dict[str, Any]] = {
    "mistral": {"targets": ["all-linear", "embed_tokens", "lm_head"], "scaling": "rslora"},
    "mixtral": {"targets": ["q_proj", "block_sparse_moe.gate", "gate_proj", "down_proj"]},
    "qwen3": {"init": "pissa"},
    "qwen3moe": {"targets": "all-linear", "layers": [1]},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_base_and_adapter_answer_as_in_llama_cpp(tmp_path: Path, family: str) -> None:
    folder = family_model(tmp_path / "hf", family)
    write_family(tmp_path / "base.gguf", folder, family)
    adapter = write_adapter(tmp_path / "a", folder, size=0.1, **SETTINGS.get(family, {}))
    export_gguf_adapter(adapter, tmp_path / "out")
    file = tmp_path / "out" / "a-lora.gguf"
    base, tuned = import_gguf(tmp_path / "base.gguf").model, load(folder).model
    load_adapter(tuned, adapter)
    close = CLOSE_GELU if family.startswith("gemma") else CLOSE
    for length in (2, WINDOW if family == "gemma2" else len(IDS)):
        assert (
            gap(ours(base, length), log_probabilities(tmp_path / "base.gguf", IDS[:length])) < close
        )
        expected = ours(tuned, length)
        assert gap(expected, log_probabilities(tmp_path / "base.gguf", IDS[:length], file)) < close
        assert gap(expected, ours(base, length)) > MOVED

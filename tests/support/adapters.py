"""Adapter folders for tests, moved away from their start, and what they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.adapters.inject import inject
from mlx_slim.adapters.store import load_adapter, save_adapter
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.models.load import load
from mlx_slim.models.save import save_model
from tests.adapters.support import IDS, shake


def write_adapter(
    folder: Path,
    base: Path,
    *,
    dora: bool = False,
    size: float = 0.05,
    stored: mx.Dtype | None = None,
    **settings: Any,
) -> Path:
    """Write an adapter folder for ``base``, moved away from its start; return it.

    ``stored`` is the dtype of the base's biases, for a pooled adapter.
    """
    loaded = load(base, dtype=mx.float32)
    config = AdapterConfig(**{"rank": 4, **settings})
    injected = inject(loaded.model, config, dora=dora, stored=stored)
    shake(loaded.model, size)
    save_adapter(folder, loaded.model, config, injected, dora=dora, base=str(base))
    return folder


def write_quantized(
    folder: Path, source: Path, bits: int = 4, dtype: mx.Dtype | None = None
) -> Path:
    """Write ``source``, cast to ``dtype``, quantized in groups of 32; return the folder."""
    loaded = load(source, dtype=dtype)
    nn.quantize(loaded.model, 32, bits)
    save_model(folder, loaded.model, loaded.tokenizer, loaded.config)
    return folder


def tuned_logits(base: Path, adapter: Path) -> mx.array:
    """Return the logits of the base with its adapter on ``IDS``."""
    model = load(base).model
    load_adapter(model, adapter)
    model.eval()
    return model(IDS)

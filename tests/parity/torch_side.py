"""PyTorch and what stands on it; ``make parity`` fails where they are missing, other runs skip."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

from tests.support.tiny import VOCAB

WHY = "needs PyTorch and peft: make parity"


def needed(name: str) -> Any:
    """Return a module of the extra ``parity``."""
    if os.environ.get("MLX_SLIM_PARITY") == "required":
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=WHY)


torch = needed("torch")
peft = needed("peft")
transformers = needed("transformers")

TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

"""PyTorch and what stands on it, and what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_slim.adapters.store import load_adapter
from mlx_slim.models.load import load
from tests.parity.optional import needed
from tests.support.tiny import VOCAB

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

IDS = [[1, 5, 9, 70, 200, 31, 8, 8, 2, 100]]


def in_torch(folder: Path) -> Any:
    """Return transformers' model of a folder, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def torch_logits(model: Any) -> np.ndarray:
    """Return the logits (T, V) of ``IDS``."""
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits[0].float().numpy()


def mlx_logits(folder: Path, adapter: Path | None = None) -> np.ndarray:
    """Return the logits (T, V) of ``IDS`` from mlx-slim, in float32."""
    model = load(folder, dtype=mx.float32).model
    if adapter is not None:
        load_adapter(model, adapter)
    model.eval()
    return np.array(model(mx.array(IDS))[0])


def gap(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest difference in units of the largest logit."""
    return float(np.abs(one - other).max() / np.abs(one).max())

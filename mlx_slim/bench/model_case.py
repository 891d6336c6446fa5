"""A small random model of one type on disk, with a byte tokenizer, rows and a text.

Invariant: the same files on every call; the folder looks like one that mlx-lm converted. Try it:
``mlx-slim bench models --type qwen3``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mlx_slim.bench.small_configs import small_config
from mlx_slim.bench.small_model import byte_tokenizer
from mlx_slim.events import StepDone
from mlx_slim.models.build import build
from mlx_slim.reading import ModelConfig

TEXT = "The quick brown fox reads seven old books about ships, and then it sleeps until noon. "


@dataclass
class ModelCase:
    """A small model of one type on disk, and what its checks share.

    Attributes:
        model_type: Module of ``mlx_lm.models``.
        folder: Where everything is; removed by the caller.
        config: ``config.json``.
        exported: The GGUF file, once it was written.
        separate: The first step over separate rows, once it was taken.
    """

    model_type: str
    folder: Path
    config: ModelConfig
    exported: Path | None = None
    separate: StepDone | None = None
    _outputs: int = field(default=0)

    @property
    def model(self) -> Path:
        """The model's folder."""
        return self.folder / "model"

    def new(self) -> Path:
        """Return a path that does not exist yet."""
        self._outputs += 1
        return self.folder / f"out-{self._outputs}"

    def text(self) -> str:
        """Return the path of a text to calibrate on."""
        return str(self.folder / "text.txt")


def build_case(model_type: str, folder: Path) -> ModelCase:
    """Write a random model of ``model_type`` with a byte tokenizer, rows and a text.

    Raises:
        Exception: Whatever its class raises where it does not build.
    """
    config = small_config(model_type)
    model = build(config)
    mx.random.seed(0)
    weights = tree_map(_disturbed, model.parameters())
    byte_tokenizer(folder / "model")
    mx.save_safetensors(
        str(folder / "model/model.safetensors"),
        dict(tree_flatten(weights)),  # type: ignore[arg-type]
        metadata={"format": "mlx"},
    )
    (folder / "model/config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    (folder / "text.txt").write_text(TEXT * 40)
    words = TEXT.split()
    rows = [
        {"prompt": " ".join(words[i : i + 2 + i % 3]), "completion": " ".join(words[-1 - i % 4 :])}
        for i in range(6)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ModelCase(model_type, folder, config)


def _disturbed(value: mx.array) -> mx.array:
    """Return ``value`` with some noise: nothing is 0 or 1 everywhere, so each tensor matters."""
    if not mx.issubdtype(value.dtype, mx.floating):
        return value
    return value + 0.02 * mx.random.normal(value.shape)

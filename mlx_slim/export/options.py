"""How to fuse and to export: the values that ``mlx-slim fuse`` and ``mlx-slim export`` take.

Invariant: the only home of these defaults; nothing heavy is imported. Try it:
``mlx-slim fuse --help``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Interval

from mlx_slim.config.options import option
from mlx_slim.config.values import MOST, PositiveInt

Dtype = Literal["float32", "bfloat16", "float16"]
Mode = Literal["auto", "merge", "keep", "dequantize", "requantize"]


@dataclass(frozen=True)
class FuseOptions:
    """How to fuse and how to judge it.

    Attributes:
        mode: ``keep`` puts the adapter beside its base; ``dequantize`` makes a dense model;
            ``requantize`` returns each layer to the format it had; ``auto`` merges a dense base,
            folds a pooled adapter into the biases of a quantized one, and dequantizes for another.
        dtype: Of the floating weights on disk; None is the base's.
        force: Write the result even if it lost the tune.
        calibration: Text to compare on; None takes Alpaca or the demo's rows.
        samples: Rows of that text.
        length: Tokens of a row.
        revision: Commit or tag of a hub model.
    """

    mode: Mode = "auto"
    dtype: Dtype | None = field(
        default=None, metadata=option("Dtype of the weights on disk; default the base's.")
    )
    force: bool = field(default=False, metadata=option("Write it even if the fine-tuning is lost."))
    calibration: str | None = field(
        default=None, metadata=option("Text file or data set to compare on; default Alpaca.")
    )
    samples: PositiveInt = field(default=4, metadata=option("Rows of the calibration text."))
    length: Annotated[int, Interval(ge=8, le=MOST)] = field(
        default=256, metadata=option("Tokens of a row.")
    )
    revision: str | None = field(default=None, metadata=option("Commit or tag of a hub model."))


@dataclass(frozen=True)
class PeftOptions:
    """How to write an adapter for PEFT.

    Attributes:
        base: Folder or hub id of the adapter's base; None takes the one that it names.
        base_name: What ``base_model_name_or_path`` says; None repeats the base.
    """

    base: str | None = field(
        default=None, metadata=option("Of an adapter: its base, if it moved.", flag="--model")
    )
    base_name: str | None = field(
        default=None, metadata=option("peft: the value of base_model_name_or_path.")
    )


@dataclass(frozen=True)
class GgufAdapterOptions:
    """How to write an adapter for llama.cpp.

    Attributes:
        base: Folder or hub id of the adapter's base; None takes the one that it names.
    """

    base: str | None = PeftOptions.base


@dataclass(frozen=True)
class HfOptions:
    """How to write a model for transformers.

    Attributes:
        dtype: Of the weights; None keeps the source's (of its scales, if quantized).
        revision: Commit or tag of a hub model.
    """

    dtype: Dtype | None = field(default=None, metadata=option("hf: dtype of the weights."))
    revision: str | None = field(default=None, metadata=option("Commit or tag of a hub model."))


@dataclass(frozen=True)
class GgufOptions:
    """How to write a model for llama.cpp.

    Attributes:
        kind: One of ``models.gguf.types.TYPES``.
        calibration: Text on which the file is compared with its source; None takes Alpaca.
        revision: Commit or tag of a hub model.
    """

    kind: str = field(
        default="f16",
        metadata=option(
            "gguf, ollama: f32, f16, q8_0, q6_k, q5_k_m, q5_k, q5_1, q5_0, q4_k_m, q4_k, q4_1 or "
            "q4_0; of ollama the default is q4_k_m.",
            flag="--type",
        ),
    )
    calibration: str | None = field(
        default=None, metadata=option("gguf, ollama: text to compare on; default Alpaca.")
    )
    revision: str | None = field(default=None, metadata=option("Commit or tag of a hub model."))


@dataclass(frozen=True)
class OllamaOptions:
    """How to write a model for Ollama.

    Attributes:
        kind: One of ``models.gguf.types.TYPES``.
        base: Of an adapter: folder or hub id of its base; None takes the one that it names.
        calibration: Text on which models are compared; None takes Alpaca.
        revision: Commit or tag of a hub model.
    """

    kind: str = "q4_k_m"
    base: str | None = PeftOptions.base
    calibration: str | None = GgufOptions.calibration
    revision: str | None = GgufOptions.revision

"""How to convert: the values that ``mlx-slim convert`` takes.

Invariant: the only home of these defaults; nothing heavy is imported. Try it:
``mlx-slim convert --help``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mlx_slim.config.options import option


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert; the only home of these defaults.

    Attributes:
        dtype: Of floating weights on disk; None keeps the source's.
        dequantize: Write dense weights instead of quantized codes.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Run Python files that the repository brings.
    """

    dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata=option("Cast the weights; quantized ones stay as they are.")
    )
    dequantize: bool = field(default=False, metadata=option("Write unquantized weights."))
    revision: str | None = field(
        default=None, metadata=option("Branch, tag or commit of a hub id.")
    )
    trust_remote_code: bool = field(
        default=False, metadata=option("Run Python files the repository brings.")
    )

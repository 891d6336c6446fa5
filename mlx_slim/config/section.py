"""What every group of keys is made of.

Invariant: a section is frozen and knows no key but its own. Try it:
``mlx-slim train smollm2-lora train.stpes=3 --dry-run``.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A frozen group of keys that knows no others."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

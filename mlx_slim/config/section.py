"""What every group of keys is made of.

Invariant: a section is frozen and knows no key but its own; every number has a range, and NaN,
infinities, true and false are none. Try it:
``mlx-slim train smollm2-lora train.stpes=3 --dry-run``.
"""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A frozen group of keys that knows no others."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        values = value if isinstance(value, list) else [value]
        if any(isinstance(one, bool) for one in values):
            field = cls.model_fields[str(info.field_name)]
            if not _mentions_bool(field.annotation):
                raise ValueError("true and false are not numbers")
        return value


def _mentions_bool(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(_mentions_bool(one) for one in get_args(annotation))

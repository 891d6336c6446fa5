"""What every group of keys is made of.

Invariant: a section is frozen and knows no key but its own; every number has a range, and NaN,
infinities, true and false are none. Try it:
``mlx-slim train smollm2-lora train.stpes=3 --dry-run``.
"""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

MOST = 1_000_000_000  # of everything that is counted; more is a slip of the keyboard
LARGEST = 1e6  # of factors: beyond it float16 and bfloat16 compute nothing of use
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Steps = Annotated[float, Field(ge=0, le=MOST)]  # or, below 1, a share of them
Factor = Annotated[float, Field(gt=0, le=LARGEST)]
Rate = Annotated[float, Field(gt=0, lt=10)]
Bytes = Annotated[int, Field(ge=1, le=2**60)]


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

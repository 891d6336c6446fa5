"""Ranges that pydantic and the command line read alike."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from annotated_types import Interval
from pydantic import TypeAdapter, ValidationError

from mlx_slim.config.values import MOST, PositiveInt, Strict


@pytest.mark.parametrize("value", [0, -1, MOST + 1, 1.5, "x"])
def test_what_is_out_of_range_is_refused(value: Any) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(PositiveInt).validate_python(value)


@pytest.mark.parametrize("value", ["3", True, 3.0, 9])
def test_a_strict_number_is_converted_from_nothing(value: Any) -> None:
    strict = TypeAdapter(Annotated[int, Interval(ge=1, le=8), Strict()])
    assert strict.validate_python(3) == 3
    with pytest.raises(ValidationError):
        strict.validate_python(value)

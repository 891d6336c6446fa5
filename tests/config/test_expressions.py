"""Expressions of task files give the value that they say."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_slim.config.expressions import compile_value


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("{{ -1 }}", -1),
        ("{{ +1 }}", 1),
        ("{{ - n }}", -3),
        ("{{ 1 - -n }}", 4),
        ("{{- -n -}}", -3),
        ("{{-n-}}", 3),  # these marks strip white space, as everywhere in Jinja
        ("{{+ n }}", 3),
        (" {{ n }}\n", 3),
        ("{{ -n|abs }}", 3),
        ("{{ [-1, n] }}", [-1, 3]),
        ("{{ 'a-' }}", "a-"),
        ("{{ '-' }}", "-"),
        ("{{ n }}-", "3-"),
        ("-{{ n }}", "-3"),
    ],
)
def test_a_sign_is_no_white_space_mark(source: str, value: Any) -> None:
    actual = compile_value(source)({"n": 3})
    assert actual == value and type(actual) is type(value)

"""A file that pydantic takes has nothing that the words for problems would name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from mlx_slim.compare.matrix_spec import MatrixSpec
from mlx_slim.config.problems import Words
from mlx_slim.config.schema import Recipe
from mlx_slim.config.section import Section
from mlx_slim.config.task import TaskSpec

Slip = tuple[tuple[str | int, ...], Any]


def slips(words: Words, schema: Any, path: tuple[str | int, ...] = ()) -> Iterator[Slip]:
    """Yield an unknown key in every section, and true wherever a number belongs."""
    choices = words._choices(schema)
    kinds = {choice.get("type") for choice in choices}
    if path and kinds & {"integer", "number"} and "boolean" not in kinds:
        yield path, True
    for choice in choices:
        if "properties" in choice:
            yield (*path, "no_such_key"), 1
            for key, inner in choice["properties"].items():
                yield from slips(words, inner, (*path, key))
        elif isinstance(choice.get("additionalProperties"), dict):
            yield from slips(words, choice["additionalProperties"], (*path, "any"))
        elif choice.get("type") == "array":
            yield from slips(words, choice["items"], (*path, 0))


@pytest.mark.parametrize("schema", [Recipe, TaskSpec, MatrixSpec])
def test_pydantic_refuses_all_that_is_screened(schema: type[Section]) -> None:
    words = Words(schema, {})
    places = list(slips(words, words.root))
    assert len(places) > 5
    for path, value in places:
        values: Any = value
        for part in reversed(path):
            values = [values] if part == 0 else {part: values}
        if not words.screen(values, {})[1]:
            continue
        with pytest.raises(ValidationError) as refused:
            schema.model_validate(values)
        at = [[str(part) for part in error["loc"]] for error in refused.value.errors()]
        assert any(str(path[-1]) in place for place in at), path

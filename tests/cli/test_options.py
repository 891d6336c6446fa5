"""Every number that a user can give has a range: on the command line, in recipes, tasks, matrices.

Options and fields are found by walking over all of them, so that a new one is held to it too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from pydantic import TypeAdapter, ValidationError

from mlx_slim.cli import main as entry
from mlx_slim.cli import options
from mlx_slim.compare.matrix import MatrixSpec
from mlx_slim.config.schema import Recipe
from mlx_slim.config.section import Section
from mlx_slim.config.task import TaskSpec
from mlx_slim.progress import listener, stage
from mlx_slim.pruning.options import PruneOptions


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield name, command
        return
    context = click.Context(command)
    for inner in command.list_commands(context):
        subcommand = command.get_command(context, inner)
        assert subcommand is not None
        yield from commands(subcommand, f"{name} {inner}".strip())


NUMBERS = [
    pytest.param(command, option, id=f"{name} {option.opts[-1]}")
    for name, command in commands(entry.command, "")
    for option in command.params
    if isinstance(option.type, (click.types.IntParamType, click.types.FloatParamType))
    and option.name != "ratio"  # one problem of several that pruning says at once
]


@pytest.mark.parametrize(("command", "option"), NUMBERS)
def test_an_option_refuses_what_is_no_number_and_what_is_out_of_range(
    command: Any, option: Any
) -> None:
    kind: Any = option.type
    assert kind.min is not None and kind.max is not None, "a number without a range"
    context = click.Context(command)
    wrong = ["nan", "inf", "-inf", "true", "1e999", str(10**30), kind.max + 1, kind.min - 1]
    for value in wrong:
        with pytest.raises(click.BadParameter):
            kind.convert(str(value), option, context)
    inside = (kind.min + kind.max) // 2 if isinstance(option.type, click.IntRange) else 0.5
    assert kind.convert(str(inside), option, context) == inside


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "0", "1", "-0.5"])
def test_a_ratio_is_refused_by_pruning_itself(
    value: str, tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prune", str(tiny("llama")), "-o", str(tmp_path / "out"), "--ratio", value]
    assert entry.run(words) == 2
    assert "expected more than 0 and less than 1" in capsys.readouterr().err


def test_the_walk_finds_the_options() -> None:
    assert len(NUMBERS) > 25


def numbers(schema: dict[str, Any], path: str, root: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (path, schema) of every number in a JSON schema."""
    if reference := schema.get("$ref"):
        name = reference.rsplit("/", 1)[-1]
        if name not in path.split("."):  # no schema holds itself
            yield from numbers(root["$defs"][name], f"{path}.{name}", root)
        return
    if schema.get("type") in ("integer", "number") and "enum" not in schema:
        yield path, schema
    for key, inner in schema.get("properties", {}).items():
        yield from numbers(inner, f"{path}.{key}", root)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from numbers(schema[key], path, root)
    for inner in schema.get("anyOf", []):
        yield from numbers(inner, path, root)


def all_numbers(kind: Any) -> list[tuple[str, Any]]:
    schema = TypeAdapter(kind).json_schema()
    return list(numbers(schema, kind.__name__, schema))


SCHEMAS = [
    one for kind in (Recipe, TaskSpec, MatrixSpec, PruneOptions) for one in all_numbers(kind)
]


@pytest.mark.parametrize(("name", "schema"), SCHEMAS, ids=[name for name, _ in SCHEMAS])
def test_a_key_has_a_range(name: Any, schema: Any) -> None:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum", schema.get("const")))
    assert (low is not None and high is not None) or "const" in schema, name


def sections(kind: type[Section]) -> Iterator[type[Section]]:
    for inner in kind.__subclasses__():
        yield inner
        yield from sections(inner)


FIELDS = [
    (kind, name)
    for kind in sections(Section)
    for name in kind.model_fields
    if any(path == f"{kind.__name__}.{name}" for path, _ in all_numbers(kind))
]


@pytest.mark.parametrize(
    ("kind", "name"), FIELDS, ids=[f"{kind.__name__}.{name}" for kind, name in FIELDS]
)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, True, [True], 10**30, -(10**30)])
def test_a_key_refuses_what_is_no_number_in_its_range(kind: Any, name: Any, wrong: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({name: wrong})
    assert any(error["loc"][:1] == (name,) for error in caught.value.errors())


def test_the_walk_finds_the_keys() -> None:
    names = {f"{kind.__name__}.{name}" for kind, name in FIELDS}
    assert len(names) > 45
    expected = (
        "AdapterConfig.layers",
        "TrainConfig.clip",
        "MemoryConfig.budget",
        "MatrixSpec.seeds",
    )
    assert names >= {
        *expected,
        "TaskSpec.num_fewshot",
        "QueryConfig.timeout",
        "SourceConfig.weight",
    }


def test_a_console_is_opened_by_the_first_stage_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []

    @contextlib.contextmanager
    def alive() -> Iterator[Any]:
        heard.append("opened")
        yield SimpleNamespace(notify=lambda event: heard.append(event.stage))
        heard.append("closed")

    monkeypatch.setattr(options, "alive", alive)
    with options.alive_on_demand():
        assert listener() is not None
    assert heard == [] and listener() is None
    with options.alive_on_demand(), stage("reading rows"):
        assert heard == ["opened", "reading rows"]
    assert heard == ["opened", "reading rows", "reading rows", "closed"] and listener() is None

"""Options that are generated from the class that owns their defaults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import Field

from mlx_slim.analyze.options import IntruderOptions
from mlx_slim.bench.options import BenchEvalOptions, BenchTrainOptions
from mlx_slim.cli import main as entry
from mlx_slim.cli.options import options_of
from mlx_slim.compare.options import CompareOptions
from mlx_slim.config.options import KEY, option
from mlx_slim.evaluation.options import ChatOptions, EvalOptions, GenerateOptions
from mlx_slim.export.options import FuseOptions, GgufOptions, HfOptions, PeftOptions
from mlx_slim.finetuning.options import DemoOptions
from mlx_slim.models.options import ConvertOptions
from mlx_slim.pruning.options import PruneOptions
from mlx_slim.quantization.options import CompressOptions
from mlx_slim.serving.options import ServeOptions
from mlx_slim.slimming.options import SlimOptions
from mlx_slim.sweeping.options import SweepOptions

OWNERS = [
    ("analyze intruders", IntruderOptions),
    ("bench eval", BenchEvalOptions),
    ("bench train", BenchTrainOptions),
    ("chat", ChatOptions),
    ("compare", CompareOptions),
    ("slim", SlimOptions),
    ("sweep", SweepOptions),
    ("convert", ConvertOptions),
    ("demo", DemoOptions),
    ("eval", EvalOptions),
    ("export", GgufOptions),
    ("export", HfOptions),
    ("export", PeftOptions),
    ("fuse", FuseOptions),
    ("generate", GenerateOptions),
    ("prune", PruneOptions),
    ("quantize", CompressOptions),
    ("serve", ServeOptions),
]


@dataclass(frozen=True)
class Oven:
    """Every kind of field."""

    degrees: Annotated[int, Field(ge=50, lt=300)] = field(
        default=180, metadata=option("Heat.", metavar="N")
    )
    fraction: Annotated[float, Field(gt=0, le=1)] = field(default=0.5, metadata=option("Part."))
    mode: Literal["fan", "grill"] = field(default="fan", metadata=option("How."))
    light: bool = field(default=False, metadata=option("Light."))
    door: bool = field(default=True, metadata=option("Door."))
    rack: bool | None = field(default=None, metadata=option("Rack."))
    book: Path | None = field(default=None, metadata=option("Recipes.", flag="--cook-book"))
    dish: tuple[str, ...] | None = field(default=None, metadata=option("Dish.", multiple=True))


def _values(*words: str) -> dict[str, Any]:
    taken: dict[str, Any] = {}

    @click.command()
    @options_of(Oven)
    def bake(**values: Any) -> None:
        taken.update(values)

    result = CliRunner().invoke(bake, list(words))
    if result.exit_code:
        raise click.UsageError(result.output)
    return taken


def test_values_are_the_defaults_of_the_class() -> None:
    expected = {one.name: one.default for one in fields(Oven)} | {"dish": ()}
    assert _values() == expected


def test_values_have_the_types_of_the_class() -> None:
    words = "--degrees 200 --fraction 1 --mode grill --light --no-door --rack --cook-book b"
    assert _values(*words.split(), "--dish", "a", "--dish", "c") == {
        "degrees": 200,
        "fraction": 1.0,
        "mode": "grill",
        "light": True,
        "door": False,
        "rack": True,
        "book": Path("b"),
        "dish": ("a", "c"),
    }


@pytest.mark.parametrize(
    "words", ["--degrees 49", "--degrees 300", "--fraction 0", "--fraction 1.1", "--mode steam"]
)
def test_ranges_and_choices_are_those_of_the_type(words: str) -> None:
    with pytest.raises(click.UsageError):
        _values(*words.split())


@pytest.mark.parametrize(("name", "owner"), OWNERS, ids=[f"{n} {o.__name__}" for n, o in OWNERS])
def test_a_command_has_every_declared_option_with_the_default_of_its_class(
    name: str, owner: type
) -> None:
    command: click.Command | None = entry.command
    for word in name.split():
        assert isinstance(command, click.Group)
        command = command.get_command(click.Context(command), word)
    assert command is not None
    params = {param.name: param for param in command.params}
    for one in fields(owner):
        if (line := one.metadata.get(KEY)) is None:
            continue
        param = params[one.name]
        assert isinstance(param, click.Option)
        assert param.help == line.help
        if one.default not in (None, False, ()):
            assert param.default == one.default


# Defaults that no options class owns, and why.
ELSEWHERE = {
    "data preview --rows": "of this command alone",
    "quantize --mode": "read from QuantizeConfig, a section of a recipe",
    "report --port": "of this command alone",
    "worker --jobs": "of this command alone",
    "worker --memory": "of this command alone",
}


def _commands(group: click.Group, name: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for inner in group.list_commands(context):
        command = group.get_command(context, inner)
        assert command is not None
        path = f"{name} {inner}".strip()
        if isinstance(command, click.Group):
            yield from _commands(command, path)
        else:
            yield path, command


def test_every_default_is_that_of_an_options_class() -> None:
    assert isinstance(entry.command, click.Group)
    defaults = {
        (path, param.name): f"{path} {param.opts[-1]}"
        for path, command in _commands(entry.command)
        for param in command.params
        if isinstance(param, click.Option) and not param.is_flag
        if isinstance(param.get_default(click.Context(command)), (str, int, float))
    }
    owned = {(name, one.name) for name, owner in OWNERS for one in fields(owner)}
    rest = {text for key, text in defaults.items() if key not in owned}
    assert rest == set(ELSEWHERE), "declare it in an options class, with config.options.option"

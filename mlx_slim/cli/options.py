"""Options of commands: those generated from an options class, and those that several share.

Invariant: what an options class owns (default, range, choices, help) is read from it;
``--json`` and ``--quiet`` reach a command as one ``mode`` of the console; every number has a
minimum and a maximum. Try it: ``mlx-slim train --help``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import shlex
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import click

from mlx_slim.artifacts import is_hub_id
from mlx_slim.config import library
from mlx_slim.config.options import KEY, CommandLine
from mlx_slim.errors import SlimError
from mlx_slim.next_steps import NextStep
from mlx_slim.progress import listening
from mlx_slim.ranks.state import LEAST_TIMEOUT

if TYPE_CHECKING:
    from mlx_slim.console import Console
    from mlx_slim.events import Event

Command = Callable[..., Any]


class Whole(click.IntRange):
    """A whole number with both bounds, by default at most 10⁹."""

    def __init__(self, least: int, most: int = 1_000_000_000) -> None:
        super().__init__(least, most)


class Real(click.FloatRange):
    """A finite number within its bounds; NaN is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or fail with the range."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return number


def options_of(owner: type, *names: str) -> Callable[[Command], Command]:
    """Add the options of fields of a dataclass, in this order.

    Args:
        owner: Its fields are declared with ``config.options.option``.
        names: Of the fields; the command gets their values under these names. None named: every
            field that is declared as an option.
    """
    fields = {field.name: field for field in dataclasses.fields(owner)}
    hints = get_type_hints(owner, include_extras=True)

    def add(command: Command) -> Command:
        declared = [name for name, field in fields.items() if KEY in field.metadata]
        for name in reversed(names or declared):
            command = _option(fields[name], hints[name])(command)
        return command

    return add


def _option(field: dataclasses.Field[Any], hint: Any) -> Callable[[Command], Command]:
    """Return one option: a flag, a pair of flags, or a value of the field's type."""
    line: CommandLine = field.metadata[KEY]
    flag = line.flag or f"--{field.name.replace('_', '-')}"
    declare = functools.partial(click.option, help=line.help, metavar=line.metavar)
    if line.multiple:
        default = field.default or None
        return declare(
            flag, field.name, multiple=True, default=default, show_default=default is not None
        )
    kind = _bare(hint)
    if kind is bool and field.default is False:
        return declare(flag, field.name, is_flag=True)
    shown = field.default is not None
    declare = functools.partial(declare, default=field.default, show_default=shown)
    if kind is bool:
        return declare(f"{flag}/--no-{flag[2:]}", field.name)
    return declare(flag, field.name, type=_type(kind))


def _bare(hint: Any) -> Any:
    """Return a type without ``None``."""
    if get_origin(hint) in (types.UnionType, Union):
        (hint,) = (one for one in get_args(hint) if one is not type(None))
    return hint


def _type(kind: Any) -> click.ParamType:
    """Return the command line's type of ``str``, ``Path``, a Literal or a number with a range."""
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    if kind is Path:
        return click.Path(path_type=Path)
    if get_origin(kind) is not Annotated:
        return click.STRING
    number, *marks = get_args(kind)
    limits = {
        name: value
        for mark in marks
        for one in getattr(mark, "metadata", [mark])
        for name in ("ge", "gt", "le", "lt")
        if (value := getattr(one, name, None)) is not None
    }
    if number is int:
        least = limits["ge"] if "ge" in limits else limits["gt"] + 1
        return Whole(least, limits["le"] if "le" in limits else limits["lt"] - 1)
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    return Real(low, high, min_open="gt" in limits, max_open="lt" in limits)


def output_mode(
    json: str = "One event a line, as JSON.", quiet: str = "Warnings and the end only."
) -> Callable[[Command], Command]:
    """Add ``--json`` and ``--quiet``; the command gets ``mode``: ``json``, ``quiet`` or ``auto``.

    Args:
        json: Help of ``--json``.
        quiet: Help of ``--quiet``.
    """

    def add(command: Command) -> Command:
        @click.option("--json", "as_json", is_flag=True, help=json)
        @click.option("--quiet", "is_quiet", is_flag=True, help=quiet)
        @wraps(command)
        def with_mode(*args: Any, as_json: bool, is_quiet: bool, **kwargs: Any) -> Any:
            if as_json and is_quiet:
                raise click.UsageError("give --json or --quiet, not both")
            mode = "json" if as_json else "quiet" if is_quiet else "auto"
            return command(*args, mode=mode, **kwargs)

        return with_mode

    return add


def rank_timeout(command: Command) -> Command:
    """Add ``--rank-timeout``, which is set before the command begins."""

    def apply(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            from mlx_slim.ranks.watch import set_timeout
            from mlx_slim.units import parse_duration

            seconds = parse_duration(value)
            if seconds < LEAST_TIMEOUT:
                raise SlimError(
                    f"--rank-timeout is {value}, expected at least {LEAST_TIMEOUT:.0f} s",
                    "two minutes, the default, outlast what slows a healthy machine",
                )
            set_timeout(seconds)

    return click.option(
        "--rank-timeout",
        metavar="TIME",
        expose_value=False,
        callback=apply,
        help="Several ranks: end when one is missing for so long.  [default: 2m]",
    )(command)


def alive() -> Console:
    """Return a console for a ``with`` block: progress goes to standard error."""
    from rich.console import Console as Terminal

    from mlx_slim.console import Console

    return Console("plain", output=Terminal(stderr=True, highlight=False))


@contextlib.contextmanager
def alive_on_demand() -> Iterator[None]:
    """Show progress as ``alive`` does, from the first stage on: before it no console is imported.

    For a command that mostly opens no stage and then ends within a second.
    """
    with contextlib.ExitStack() as opened:

        class OnDemand:
            console: Console | None = None

            def notify(self, event: Event) -> None:
                if self.console is None:
                    self.console = opened.enter_context(alive())
                self.console.notify(event)

        opened.enter_context(listening(OnDemand()))
        yield


def show_next(*steps: NextStep) -> None:
    """Print the suggested next commands on standard error, apart from a command's output."""
    width = max(len(one.why) for one in steps)
    click.echo("next:", err=True)
    for one in steps:
        click.echo(f"  {one.why:<{width}}  {one.command}", err=True)


def show_columns(rows: Sequence[Sequence[str]], right: Collection[str] = ()) -> None:
    """Print a table: its headings first; columns of the headings in ``right`` end at one place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if heading in right else cell.ljust(width)
            for heading, cell, width in zip(rows[0], row, widths, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def refuse_model(name: str) -> None:
    """Refuse a model where a recipe belongs; a folder that is called like a recipe is no model.

    Raises:
        SlimError: With what trains it.
    """
    if name.endswith((".yaml", ".yml")) or name in library.names("recipes"):
        return
    if Path(name).expanduser().is_dir() or ("/" in name and is_hub_id(name)):
        raise SlimError(
            f"{name} is a model, not a recipe",
            f"train it on rows: mlx-slim train {shlex.quote(name)} --data ROWS -o RUN",
        )


def recipe_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return the shipped recipes whose names begin with ``incomplete``, for a shell."""
    from mlx_slim.config import library

    return [name for name in library.names("recipes") if name.startswith(incomplete)]


def run_options(command: Command) -> Command:
    """Add the options of commands that run a recipe into a folder."""
    folder = click.Path(path_type=Path)
    for add in (
        output_mode(),
        click.option("--dry-run", is_flag=True, help="Print the resolved recipe, write nothing."),
        click.option(
            "--resume", is_flag=True, help="Resume an interrupted run, or train more steps."
        ),
        rank_timeout,
        click.option("-o", "--out", type=folder, help="Run folder [runs/RECIPE]."),
        click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]..."),
        click.argument("recipe", shell_complete=recipe_names),
    ):
        command = add(command)
    return command

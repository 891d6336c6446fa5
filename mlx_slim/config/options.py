"""Fields of an options class that the command line is generated from.

Invariant: a default, a range and a help text stand once, at the field; ``cli/options.py`` reads
them. Ranges and choices are those of the field's type. Try it: ``mlx-slim eval --help``.
"""

from __future__ import annotations

from dataclasses import dataclass

KEY = "command line"


@dataclass(frozen=True)
class CommandLine:
    """How a field looks on the command line.

    Attributes:
        help: Its text in ``--help``.
        metavar: What stands for the value; None leaves it to the type.
        flag: The option, where it is not the field's name with dashes.
        multiple: Whether the option may be repeated; its value is a tuple then.
    """

    help: str
    metavar: str | None = None
    flag: str | None = None
    multiple: bool = False


def option(
    help: str, *, metavar: str | None = None, flag: str | None = None, multiple: bool = False
) -> dict[str, CommandLine]:
    """Return the metadata of a dataclass field that is an option; arguments as ``CommandLine``."""
    return {KEY: CommandLine(help, metavar, flag, multiple)}

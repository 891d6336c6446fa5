"""How ``doctor --self-test`` and ``bench suite`` end: a table or JSON, a file, an exit code.

Invariant: the exit code is 1 when a check is off, however the record is shown. Try it:
``mlx-slim doctor --self-test -o self-test.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from mlx_slim.artifacts import check_writable, exists_already, write_json
from mlx_slim.cli.options import alive
from mlx_slim.reading import JsonObject

HEADINGS = ("check", "measured", "allowed", "", "")
OFF_EXIT_CODE = 1


def measured(
    measure: Callable[[Callable[[str], None]], JsonObject],
    out: Path | None,
    as_json: bool,
    rows: Callable[[JsonObject], Sequence[Sequence[str]]] | None = None,
) -> int:
    """Measure, show the record, write it; return the exit code.

    Args:
        measure: Returns a record with ``checks`` and ``ok``; its argument is told what went wrong.
        out: File to write; must not exist.
        as_json: Print the record, not tables.
        rows: Further lines below the table of checks.

    Raises:
        SlimError: If ``out`` exists or cannot be written, before anything is measured.
    """
    if out is not None:
        if os.path.lexists(out):
            raise exists_already(out)
        check_writable(out.parent)
    with alive():
        record = measure(lambda line: click.echo(f"warning: {line}", err=True))
    if out is not None:
        write_json(out, record, replace=False)
    if as_json:
        click.echo(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        _show([HEADINGS, *map(_cells, record["checks"])])
        if rows is not None:
            click.echo()
            _show(rows(record))
        off = [check["check"] for check in record["checks"] if check["status"] == "off"]
        click.echo(f"\n{_machine(record['machine'])}, {record['seconds']:.0f} s")
        verdict = f"off: {'; '.join(off)}" if off else "all checks ok"
        click.secho(verdict, fg="red" if off else "green")
    return 0 if record["ok"] else OFF_EXIT_CODE


def _cells(check: JsonObject) -> tuple[str, ...]:
    """Return the line of one check."""
    value, limit, unit = check["measured"], check["allowed"], check["unit"]
    figure = "–" if value is None else f"{value:,.4g} {unit}".rstrip()
    return (
        check["check"],
        figure,
        "" if limit is None else f"{limit:g} {unit}".rstrip(),
        check["status"],
        check["note"],
    )


def _machine(machine: JsonObject) -> str:
    device = machine["device"]
    versions = machine["versions"]
    return f"{device['name']}, {device['type']}, {device['dtype']}, MLX {versions['mlx']}"


def _show(rows: Sequence[Sequence[str]]) -> None:
    """Print cells in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())

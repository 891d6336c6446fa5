"""``mlx-slim data``: show data as the training loop will see it.

Invariant: ``preview`` uses the same pipeline as training; nothing is
written. Try it: ``mlx-slim data preview smollm2-lora --rows 2``, ``mlx-slim data overlap a.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from mlx_slim.cli.options import Whole, alive, show_next
from mlx_slim.errors import SlimError
from mlx_slim.next_steps import step
from mlx_slim.progress import tracked
from mlx_slim.reading import JsonObject

if TYPE_CHECKING:
    from mlx_slim.config.preference import PreferenceRows
    from mlx_slim.config.schema import DataConfig
    from mlx_slim.data.pipeline import Pipeline


@click.group(epilog="Example: mlx-slim data preview smollm2-lora")
def command() -> None:
    """Show rows as the model will read them, and find overlaps."""


@command.command(epilog="Example: mlx-slim data preview smollm2-lora data.path=rows.jsonl")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--rows", type=Whole(1), default=3, show_default=True, help="Rows to show.")
def preview(recipe: str, overrides: tuple[str, ...], rows: int) -> None:
    """Show the first rows of RECIPE with the supervised tokens coloured."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from rich.console import Console

    from mlx_slim.config.load import load_recipe
    from mlx_slim.console.rows import legend, row_text
    from mlx_slim.data.formats import check_renamed
    from mlx_slim.data.ledger import SourceLedger, notes
    from mlx_slim.data.pipeline import Pipeline
    from mlx_slim.data.tokenize import unwrap
    from mlx_slim.evaluation.tasks.training_rows import finder
    from mlx_slim.models.load import load_tokenizer

    resolved = load_recipe(recipe, overrides).recipe
    with alive():
        tokenizer = load_tokenizer(resolved.model, revision=resolved.revision)
    pipeline = Pipeline(
        resolved.data,
        tokenizer,
        max_length=resolved.train.max_length,
        preference=resolved.preference_rows,
    )
    console = Console(highlight=False, soft_wrap=True)
    marks = ("", "") if console.color_system else ("⟦", "⟧")
    console.print(
        f"template: {pipeline.template.name}; at most {pipeline.max_length} tokens, "
        f"longer rows: {resolved.data.truncation}, longer texts: {_longer_texts(pipeline)}",
        markup=False,
    )
    console.print(legend(*marks))
    with TemporaryDirectory() as folder:
        find = finder(Path(folder))
        seen: set[str] = set()
        for config in resolved.data.sources:
            source = find(config)
            ledger = SourceLedger(source.name, source.kind, config.weight, source.ignored)
            console.rule(f"{source.name} ({source.kind}, weight {config.weight:g})")
            for row in islice(pipeline.rows(source, config, ledger), rows):
                console.print(row_text(row, unwrap(tokenizer), *marks))
            read = f"of the first {ledger.rows_read:,} rows"
            dropped = "; ".join(ledger.reasons()) or "none"
            console.print(f"{read}, dropped: {dropped}", style="dim", markup=False)
            for line in notes({"sources": [ledger.as_record()]}):
                console.print(line, style="yellow", markup=False)
            seen |= ledger.columns
        check_renamed(resolved.data.columns, seen)
    words = [recipe, *overrides]
    show_next(
        step("see what it costs", "mlx-slim", "plan", *words),
        step("train on it", "mlx-slim", "train", *words, "-o", "runs/mine"),
    )


def _longer_texts(pipeline: Pipeline) -> str:
    """Return what is done with rows of plain text that are too long."""
    if pipeline.config.splits("text"):
        return f"split (data.split), {pipeline.context} tokens of context"
    return pipeline.config.truncation


@command.command(epilog="Example: mlx-slim data overlap rows.jsonl")
@click.argument("source", metavar="RECIPE_OR_FILE")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--data-dir", metavar="DIR", help="Evaluation data (default: MLX_SLIM_DATA).")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def overlap(source: str, overrides: tuple[str, ...], data_dir: str | None, as_json: bool) -> None:
    """Count the rows that hold questions of the evaluation data."""
    from mlx_slim.data.overlap import Checker

    config, preference = _data_config(source, overrides)
    checker = Checker.from_mirror(data_dir)
    if checker.index is None:
        raise SlimError(
            f"no evaluation data in {data_dir or 'MLX_SLIM_DATA'}",
            "name the data mirror with --data-dir or MLX_SLIM_DATA",
        )
    with alive():
        for place, texts in tracked(
            _texts(config, preference), "comparing with the evaluation data", "rows"
        ):
            checker.add(place, texts)
    report = checker.report()
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    _print_report(report)
    show_next(step("see the rows", "mlx-slim", "data", "preview", "RECIPE", f"data.path={source}"))


def _data_config(
    source: str, overrides: tuple[str, ...]
) -> tuple[DataConfig, PreferenceRows | None]:
    """Return the data section of a recipe and its kind of rows, or one that names the file."""
    from pathlib import Path

    from mlx_slim.config.load import load_recipe
    from mlx_slim.config.schema import DataConfig
    from mlx_slim.data.readers import is_data

    path = Path(source).expanduser()
    if is_data(path) or path.is_dir():
        if overrides:
            raise SlimError(
                f"{source} is data, and KEY=VALUE needs a recipe", "leave out KEY=VALUE"
            )
        return DataConfig(path=source), None
    recipe = load_recipe(source, overrides).recipe
    return recipe.data, recipe.preference_rows


def _texts(
    config: DataConfig, preference: PreferenceRows | None
) -> Iterator[tuple[Any, list[str]]]:
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from mlx_slim.data.formats import Dropped, check_columns, check_renamed, read_example
    from mlx_slim.data.preference_rows import read_answers
    from mlx_slim.evaluation.tasks.training_rows import finder

    check_columns(config.columns)
    named = {"columns": config.columns, "system": config.system}
    seen: set[str] = set()
    with TemporaryDirectory() as folder:
        for source_config in config.sources:
            for raw in finder(Path(folder))(source_config):
                seen |= raw.value.keys() & set(config.columns.values())
                try:
                    if preference is None:
                        format = source_config.format or config.format
                        examples = [read_example(raw, format, **named)]
                    else:
                        examples = read_answers(raw, preference, **named)
                except Dropped:
                    continue
                yield raw, [text for example in examples for text in example.texts]
    check_renamed(config.columns, seen)


def _print_report(report: JsonObject) -> None:
    from rich.console import Console
    from rich.table import Table

    words = report["words_in_a_row"]
    table = Table(
        title=f"{report['rows_overlapping']:,} of {report['rows_checked']:,} rows share "
        f"{words['long']} words in a row ({words['short']} for short questions) with a question"
    )
    for heading in ("data set", "questions", "too short", "found", "rows", "first"):
        table.add_column(heading, justify="left" if heading in ("data set", "first") else "right")
    for name, entry in report["datasets"].items():
        table.add_row(
            name,
            f"{entry['questions']:,}",
            f"{entry['questions_too_short_to_check']:,}",
            f"{entry['questions_found']:,}",
            f"{entry['rows_overlapping']:,}",
            entry["first"][0] if entry["first"] else "",
        )
    Console(highlight=False).print(table)

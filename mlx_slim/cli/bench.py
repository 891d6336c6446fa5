"""``mlx-slim bench``: speed and memory against peers; predicted against measured memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mlx_slim.bench.options import BenchEvalOptions, BenchTrainOptions
from mlx_slim.cli.measurements import measured
from mlx_slim.cli.options import alive, options_of, show_next
from mlx_slim.next_steps import step
from mlx_slim.reading import JsonObject

_JSON = click.option("--json", "as_json", is_flag=True, help="Print the whole record as JSON.")


@click.group("bench", epilog="Example: mlx-slim bench train models/mine")
def command() -> None:
    """Measure speed and memory side by side with peers, each side in its own process."""


@command.command("train", epilog="Example: mlx-slim bench train models/mine --against mlx-lm")
@click.argument("model")
@options_of(BenchTrainOptions)
@_JSON
def train(model: str, as_json: bool, **options: Any) -> None:
    """Train one epoch of the same rows on both sides, alternating, and compare."""
    work = BenchTrainOptions(**options)
    against = work.against
    if against == work.method and not work.profile:
        raise click.UsageError(f"--against {against} is the method itself")
    from mlx_slim.bench.rounds import peak_key
    from mlx_slim.bench.train import bench_train
    from mlx_slim.units import human_bytes, human_duration

    def progress(line: str) -> None:
        click.echo(line, err=True)

    with alive():
        record = bench_train(model, work, progress)
    if as_json:
        click.echo(json.dumps(record, indent=2))
        return
    if work.profile:
        _show_profile(record["profile"])
        show_next(step("compare with a peer", "mlx-slim", "bench", "train", model))
        return
    other = against.replace("-", "_")
    peak = peak_key(record[other])
    for side in ("ours", other):
        numbers = record[side]
        click.echo(
            f"{side:8} {numbers['tokens_per_second']:8.1f} tokens/s   "
            f"peak {human_bytes(numbers[peak])}"
        )
    ratio = record["ratio"]
    click.echo(f"ratio    {ratio['speed']:.2f} x speed, {ratio['peak_memory']:.2f} x peak memory")
    if against == "eager":
        first = [human_duration(record[side]["first_epoch_seconds"]) for side in ("ours", other)]
        click.echo(
            f"shapes   {record['ours']['shapes']:.0f} are compiled; the first epoch took "
            f"{first[0]}, not compiled {first[1]}"
        )
    show_next(step("measure scoring too", "mlx-slim", "bench", "eval", model))


def _show_profile(profile: JsonObject) -> None:
    """Print the components of a step, most seconds first, and what they add up to."""
    whole, rate = profile["seconds"], profile["blas_gflops"]
    click.echo(
        f"{'component':36} {'calls':>7} {'seconds':>8} {'share':>6} {'GFLOP':>9} {'of BLAS':>8}"
    )
    for component in profile["components"]:
        products = " " * 18
        if component["gflop"] and component["seconds"] > 0:
            reached = component["gflop"] / component["seconds"] / rate
            products = f"{component['gflop']:9,.1f} {reached:8.0%}"
        click.echo(
            f"{component['name']:36} {component['calls']:7,} {component['seconds']:8.2f} "
            f"{component['seconds'] / whole:6.1%} {products}".rstrip()
        )
    click.echo(
        f"{'all':36} {'':7} {whole:8.2f} {1:6.1%} {profile['gflop']:9,.1f} "
        f"{profile['gflop'] / whole / rate:8.0%}"
    )
    click.echo(
        f"{profile['tokens_per_second']:.1f} tokens/s on {profile['threads']} threads; at the "
        f"{rate:.0f} GFLOP/s of the largest product here, and nothing else to do, "
        f"{profile['ceiling_tokens_per_second']:.1f}"
    )


@command.command(
    "eval", epilog="Example: mlx-slim bench eval models/mine --task hellaswag --limit 50"
)
@click.argument("model")
@options_of(BenchEvalOptions)
@_JSON
def evaluate(model: str, as_json: bool, **options: Any) -> None:
    """Score the same questions on both sides, alternating, and compare."""
    from mlx_slim.bench.evaluate import bench_eval
    from mlx_slim.bench.rounds import peak_key
    from mlx_slim.units import human_bytes

    def progress(line: str) -> None:
        click.echo(line, err=True)

    with alive():
        record = bench_eval(model, BenchEvalOptions(**options), progress)
    if as_json:
        click.echo(json.dumps(record, indent=2))
        return
    other = record["work"]["against"].replace("-", "_")
    peak = peak_key(record[other])
    for side in ("ours", other):
        numbers = record[side]
        click.echo(
            f"{side:8} {numbers['questions_per_second']:8.3f} questions/s   "
            f"peak {human_bytes(numbers[peak])}"
        )
    ratio, ours = record["ratio"], record["ours"]
    click.echo(f"ratio    {ratio['speed']:.2f} x speed, {ratio['peak_memory']:.2f} x peak memory")
    click.echo(
        f"tokens   {ours['tokens_computed_per_question']:.1f} computed per question, "
        f"{ratio['computed_to_minimum']:.3f} x the minimum"
    )
    click.echo("answers  " + ", ".join(f"{k} {v}" for k, v in record["agreement"].items()))
    show_next(step("measure training too", "mlx-slim", "bench", "train", model))


@command.command(
    "models", epilog="Example: mlx-slim bench models --type qwen3 --type gemma3 --column LoRA"
)
@click.option("--type", "types", multiple=True, help="A model type of mlx-lm; all by default.")
@click.option("--column", "columns", multiple=True, help="A column of the table; all by default.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="File for the record as JSON; the page is written beside it, as Markdown.",
)
@_JSON
def models(
    types: tuple[str, ...], columns: tuple[str, ...], output: Path | None, as_json: bool
) -> None:
    """Check what works for each model type of mlx-lm, on small random models (half an hour)."""
    from mlx_slim.artifacts import check_writable, exists_already, write_json, write_text
    from mlx_slim.bench.model_page import page
    from mlx_slim.bench.models import bench_models, read_table

    if output is not None:  # before half an hour of work
        if output.suffix != ".json":
            raise click.UsageError(f"-o {output}: expected a name that ends in .json")
        check_writable(output.parent)
        if output.exists():
            read_table(output)  # another file is not replaced
        elif output.with_suffix(".md").exists():
            raise exists_already(output.with_suffix(".md"))
    with alive():
        table = bench_models(types, columns, lambda line: click.echo(line, err=as_json))
    if output is not None:
        write_json(output, table.as_json())
        write_text(output.with_suffix(".md"), page(table))
    if as_json:
        click.echo(json.dumps(table.as_json(), indent=2))
        return
    if output is not None:
        show_next(step("see the table", "less", output.with_suffix(".md")))


@command.command("plan", epilog="Example: mlx-slim bench plan models/mine")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="File that collects the cases; those in it are not run again.",
)
@_JSON
def plan(model: str, output: Path | None, as_json: bool) -> None:
    """Compare predicted with measured peak memory over 32 small runs (a quarter of an hour).

    MODEL is a small dense model; a random model of another architecture is added.
    """
    from mlx_slim.bench.plan import bench_plan

    if not as_json:
        click.echo(f"{'case':36} {'predicted':>10} {'measured':>10} {'error':>7}")
    with alive():
        record = bench_plan(model, output, lambda line: click.echo(line, err=as_json))
    if as_json:
        click.echo(json.dumps(record, indent=2))
        return
    click.echo(
        f"{record['n']} runs, {record['within_15_percent']:.0%} within 15%; error: median "
        f"{record['median_error']:.1%}, largest {record['worst_error']:.1%}"
    )
    show_next(step("measure training", "mlx-slim", "bench", "train", model))


@command.command("suite", epilog="Example: mlx-slim bench suite -o bench/results/my-machine.json")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="File for the record, without names and paths.",
)
@_JSON
def suite(output: Path | None, as_json: bool) -> int:
    """Run the self-test, then measure train, eval, generation (three minutes on 2 cores).

    The model is SmolLM2-135M from the package index, the rows are those of the demo: no data set is
    needed, and every machine does the same work.
    """
    from mlx_slim.bench import suite as speeds

    return measured(speeds.suite, output, as_json, speeds.speed_rows)

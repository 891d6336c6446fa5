"""``mlx-slim analyze``: what tuning did to the weights, and where memory goes.

Invariant: ``intruders`` leaves a whole folder or none; ``memory`` is the planner's breakdown, from
shapes alone. Try it: ``mlx-slim analyze memory tinyllama-lora``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_slim.analyze.options import IntruderOptions
from mlx_slim.cli.options import alive, options_of, show_next
from mlx_slim.next_steps import step
from mlx_slim.reading import JsonObject

if TYPE_CHECKING:
    from mlx_slim.analyze.intruders import Intruders, MatrixSpectra
    from mlx_slim.analyze.repair import Repaired


@click.group("analyze", epilog="Example: mlx-slim analyze memory tinyllama-lora")
def command() -> None:
    """See what tuning did to the weights, and where memory goes."""


@command.command(
    "intruders",
    epilog="Example: mlx-slim analyze intruders models/mine --adapter runs/mine/adapters -o out",
)
@click.argument("base")
@options_of(IntruderOptions, "adapter", "tuned", "k", "epsilon", "repair")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New folder.")
@options_of(IntruderOptions, "no_cache")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def intruders(
    base: str, output: Path, repair: float | None, no_cache: bool, as_json: bool, **options: Any
) -> None:
    """Count the singular directions that tuning added to the weights of BASE (arXiv 2410.21228).

    Writes intruders.json and intruders.svg. An adapter that a QLoRA run trained is compared with
    the quantized base that it was trained on. With --repair the folder is an adapter of the same
    rank too, with that share of each intruder left: less is forgotten, and less is learned.
    """
    if (options["adapter"] is None) == (options["tuned"] is None):
        raise click.UsageError("give either --adapter DIR or --tuned MODEL")
    if repair is not None and options["adapter"] is None:
        raise click.UsageError("--repair takes --adapter DIR: a whole model is not repaired")
    from mlx_slim.analyze.intruder_plot import plot
    from mlx_slim.analyze.intruders import find_intruders
    from mlx_slim.analyze.repair import repair_intruders
    from mlx_slim.analyze.spectrum import cache_folder
    from mlx_slim.artifacts import (
        SCHEMA_VERSION,
        atomic_folder,
        provenance,
        write_json,
        write_text,
    )
    from mlx_slim.claims import new_folder

    def progress(matrix: MatrixSpectra) -> None:
        if not as_json:
            click.echo(_line(matrix), err=True)

    inputs = {"base": base, **options, **({} if repair is None else {"repair": repair})}
    cache, repaired = None if no_cache else cache_folder(), None
    with alive(), new_folder(output, "analyze intruders", inputs):
        if repair is None:
            result = find_intruders(base, cache=cache, progress=progress, **options)
        else:
            del options["tuned"]
            repaired = repair_intruders(
                base, keep=repair, cache=cache, progress=progress, **options
            )
            result = repaired.before
        record = {
            "schema_version": SCHEMA_VERSION,
            **result.as_record(),
            **({} if repaired is None else {"repair": repaired.as_record()}),
            "provenance": provenance(),
        }
        with atomic_folder(output) as temporary:
            write_text(temporary / "intruders.svg", plot(result))
            write_json(temporary / "intruders.json", record)
            if repaired is not None:
                repaired.write(temporary)
    if as_json:
        click.echo(json.dumps(record))
        return
    for line in _summary(result):
        click.echo(line)
    if repaired is not None:
        click.echo(_repair_line(repaired))
    click.echo(f"written    {output}")
    if repaired is None:
        show_next(step("see them", "less", output / "intruders.json"))
    else:
        show_next(step("try it", "mlx-slim", "generate", base, "--adapter", output))


def _repair_line(repaired: Repaired) -> str:
    record, before, after = repaired.as_record(), repaired.before, repaired.after
    return (
        f"repaired   {len(record['repaired'])} of {len(before.matrices)} matrices, "
        f"{repaired.keep:g} of each intruder kept: {before.overall()['intruders']} intruders now "
        f"{after.overall()['intruders']}, |dW|/|W| {before.overall()['delta_norm']:.4f} now "
        f"{after.overall()['delta_norm']:.4f}"
    )


def _line(matrix: MatrixSpectra) -> str:
    from mlx_slim.units import human_duration

    return (
        f"{matrix.path:<44} {matrix.intruders:>3} intruders   nearest cosine "
        f"{min(matrix.cosine):.2f}   |dW|/|W| {matrix.delta_norm:.4f}   "
        f"effective rank {matrix.effective_rank:.1f}   {human_duration(matrix.seconds)}"
    )


def _summary(intruders: Intruders) -> list[str]:
    total = intruders.overall()
    near = [intruders.count(intruders.k, epsilon) for epsilon in (0.3, 0.7, 0.9)]
    return [
        f"intruders  {total['intruders']:.0f} of {total['matrices'] * intruders.k:.0f} leading "
        f"directions, in {total['matrices_with_intruders']:.0f} of {total['matrices']:.0f} matrices"
        f" (k={intruders.k}, epsilon={intruders.epsilon:g}; at 0.3, 0.7, 0.9: "
        f"{', '.join(map(str, near))})",
        f"energy     {total['energy']:.3%} of the tuned weights' is in them",
        f"change     |dW|/|W| = {total['delta_norm']:.4f}, effective rank of dW "
        f"{total['effective_rank']:.1f} on average",
    ]


@command.command("memory", epilog="Example: mlx-slim analyze memory tinyllama-lora")
@click.argument("recipe_or_model")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def memory(recipe_or_model: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what takes memory: of a recipe in training, or of a model's weights."""
    from mlx_slim.units import human_bytes

    breakdown = _breakdown(recipe_or_model, overrides)
    if as_json:
        click.echo(json.dumps({"schema_version": 1, "of": recipe_or_model, **breakdown}))
        return
    width = max(map(len, breakdown["parts"]))
    for name, size in sorted(breakdown["parts"].items(), key=lambda item: -item[1]):
        fraction = size / max(1, breakdown["total_bytes"])
        bar = "█" * round(40 * fraction)
        click.echo(f"{name:<{width}}  {human_bytes(size):>9}  {fraction:6.1%}  {bar}")
    click.echo(f"{'total':<{width}}  {human_bytes(breakdown['total_bytes']):>9}")
    named = [recipe_or_model] if overrides or _is_recipe(recipe_or_model) else []
    named = named or ["smollm2-lora", f"model={recipe_or_model}", "revision=null"]
    show_next(step("see what makes it fit", "mlx-slim", "plan", *named, *overrides))


def _is_recipe(name: str) -> bool:
    from mlx_slim.config import library

    return name in library.names("recipes") or name.endswith((".yaml", ".yml"))


def _breakdown(name: str, overrides: tuple[str, ...]) -> JsonObject:
    from mlx_slim.config.load import load_recipe
    from mlx_slim.models.load import read_config
    from mlx_slim.planner.memory import predict, weight_bytes
    from mlx_slim.planner.shipped_models import model_config

    if _is_recipe(name) or (overrides and not Path(name).is_dir()):
        recipe = load_recipe(name, overrides).recipe
        sizes = predict(model_config(recipe)[0], recipe, suggest=False).breakdown
    else:
        sizes = weight_bytes(read_config(name))
    return {"total_bytes": sum(sizes.values()), "parts": sizes}

"""``mlx-slim plan``: what a recipe will cost, before it costs anything.

Invariant: nothing is downloaded but a config, no weights are read, nothing is written. ``--json``
has the fields that other programs read. Try it: ``mlx-slim plan tinyllama-lora --budget 16GB``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from mlx_slim.errors import SlimError

if TYPE_CHECKING:
    from mlx_slim.analyze.memory import Prediction
    from mlx_slim.config.load import Resolved


def duration(seconds: float) -> str:
    """Return ``3 h 20 min``, ``12 min`` or ``40 s``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes / 1440:.1f} days"


def on_a_mac(name: str) -> Prediction:
    """Return the prediction of a shipped recipe for a Mac (bfloat16), whatever runs here."""
    from mlx_slim.analyze.known_models import model_config
    from mlx_slim.analyze.memory import predict
    from mlx_slim.analyze.work import expected_work
    from mlx_slim.config.load import load_recipe

    recipe = load_recipe(name).recipe
    work = expected_work(recipe, local=False)
    config, _ = model_config(recipe)
    return predict(config, recipe, gpu=True, budget=0, work=work, suggest=False)


def cost_header(name: str) -> str:
    """Return the two lines that stand in the header of a shipped recipe."""
    from mlx_slim.analyze.macs import smallest_that_fits

    found = on_a_mac(name)
    smallest = smallest_that_fits(found.predicted_peak_bytes)
    fits = f"fits a Mac with {smallest} GB" if smallest else "fits no Mac in the table"
    return (
        f"# Predicted on a Mac (bfloat16): peak memory {_gb(found.predicted_peak_bytes)}, {fits}.\n"
        f"# On disk: run folder up to {_gb(found.disk_bytes)}, "
        f"model download {_gb(found.download_bytes)}."
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def table() -> str:
    """Return the Markdown table of all shipped recipes: predicted memory, and which Macs fit."""
    from mlx_slim.analyze.macs import SIZES, working_set
    from mlx_slim.config import library

    lines = [
        "| recipe | peak memory | " + " | ".join(f"{size} GB" for size in SIZES) + " |",
        "|---|---|" + "---|" * len(SIZES),
    ]
    for name in library.names("recipes"):
        peak = on_a_mac(name).predicted_peak_bytes
        marks = " | ".join("✓" if peak <= working_set(size) else "–" for size in SIZES)
        lines.append(f"| {name} | {_gb(peak)} | {marks} |")
    return "\n".join(lines)


def _text(resolved: Resolved, found: Prediction, note: str) -> str:
    from mlx_slim.runtime import human_bytes

    recipe = resolved.recipe
    fits = "fits" if found.fits else "does NOT fit"
    budget = human_bytes(found.budget_bytes)
    share = 100 * found.trainable_parameters / max(1, found.parameters)
    time = "unknown" if found.predicted_seconds is None else duration(found.predicted_seconds)
    tokens = f"{found.tokens:,} tokens, {found.tokens_basis}" if found.tokens else "rows not found"
    download = f"model download {human_bytes(found.download_bytes)}"
    rows = [
        ("model", f"{recipe.model} ({found.parameters:,} parameters; {note})"),
        ("method", f"{recipe.method}, {found.trainable_parameters:,} trainable ({share:.2f}%)"),
        ("dtype", found.dtype),
        ("peak memory", f"{human_bytes(found.predicted_peak_bytes)}, {fits} in {budget}"),
        *((f"  {name}", human_bytes(size)) for name, size in found.breakdown.items()),
        ("time", f"about {time} on this device ({tokens})" if found.predicted_seconds else tokens),
        ("disk", f"run folder up to {human_bytes(found.disk_bytes)}; {download}"),
    ]
    lines = [f"{label:<14}{text}" for label, text in rows]
    if found.suggestions:
        title = "to use less" if found.fits else "to make it fit, cheapest first"
        lines += ["", f"{title}:"]
        width = max(len(s.set) for s in found.suggestions)
        for s in found.suggestions:
            verdict = "" if s.predicted_peak_bytes <= found.budget_bytes else "  (still too much)"
            lines.append(f"  {s.set:<{width}}  {human_bytes(s.predicted_peak_bytes)}{verdict}")
    return "\n".join(lines)


@click.command()
@click.argument("recipe", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--budget", metavar="SIZE", help="Plan for this much memory, e.g. 16GB.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--table", "as_table", is_flag=True, help="All shipped recipes against all Macs.")
def command(
    recipe: str | None,
    overrides: tuple[str, ...],
    budget: str | None,
    as_json: bool,
    as_table: bool,
) -> None:
    """Predict peak memory, time and disk of RECIPE (a name or a .yaml file)."""
    if as_table:
        click.echo(table())
        return
    if recipe is None:
        raise SlimError("no recipe is named", "mlx-slim recipes lists them")
    from mlx_slim.analyze.known_models import model_config
    from mlx_slim.analyze.memory import predict
    from mlx_slim.analyze.work import measure_speed
    from mlx_slim.config.load import load_recipe
    from mlx_slim.runtime import parse_size, resolve_dtype

    resolved = load_recipe(recipe, overrides)
    config, note = model_config(resolved.recipe)
    limit = parse_size(budget) if budget else None
    speed = measure_speed(resolve_dtype(resolved.recipe.train.dtype))
    found = predict(config, resolved.recipe, budget=limit, speed=speed)
    if as_json:
        click.echo(json.dumps({"schema_version": 1, "recipe": resolved.name, **found.as_record()}))
    else:
        click.echo(_text(resolved, found, note))

"""``mlx-slim plan``: predicted memory, time and disk of a recipe.

Invariant: nothing is written; without ``--probe`` nothing is downloaded but a config and no weights
are read. ``--json`` has the fields that other programs read. Try it:
``mlx-slim plan tinyllama-lora --budget 16GB``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from mlx_slim.cli.options import (
    Whole,
    alive,
    alive_on_demand,
    recipe_names,
    refuse_model,
    show_next,
)
from mlx_slim.errors import SlimError
from mlx_slim.next_steps import step

if TYPE_CHECKING:
    from mlx_slim.config.load import Resolved
    from mlx_slim.planner.links import SeveralMachines
    from mlx_slim.planner.memory import Prediction
    from mlx_slim.planner.suggest import Suggestion
    from mlx_slim.planner.time import Range


def on_a_mac(name: str) -> tuple[Prediction, int | None]:
    """Return the prediction of a shipped recipe for the smallest Mac that holds it (bfloat16).

    The second value is that Mac's memory in GB; None where no Mac in the table is large enough.
    """
    from mlx_slim.config.load import load_recipe
    from mlx_slim.planner.macs import SIZES, budget, smallest_that_fits, working_set
    from mlx_slim.planner.memory import predict
    from mlx_slim.planner.shipped_models import model_config

    recipe = load_recipe(name).recipe
    config, _ = model_config(recipe)
    size: int | None = SIZES[0]
    while True:  # a larger Mac computes larger chunks of logits, so its peak differs
        mac = {"gpu": True, "budget": budget(size), "gpu_bytes": working_set(size)}
        prediction = predict(config, recipe, **mac, local=False, suggest=False)
        if prediction.fits:
            return prediction, size
        size = smallest_that_fits(prediction.predicted_peak_bytes)
        if size is None:
            return prediction, None


def cost_header(name: str) -> str:
    """Return the two comment lines with the cost of a shipped recipe."""
    from mlx_slim.units import human_bytes

    prediction, smallest = on_a_mac(name)
    fits = f"fits a Mac with {smallest} GB" if smallest else "fits no Mac in the table"
    peak = human_bytes(prediction.predicted_peak_bytes)
    return (
        f"# Predicted on a Mac (bfloat16): peak memory {peak}, {fits}.\n"
        f"# On disk: run folder up to {human_bytes(prediction.disk_bytes)}, "
        f"model download {human_bytes(prediction.download_bytes)}."
    )


def table() -> str:
    """Return the Markdown table of all shipped recipes: predicted memory, and which Macs fit."""
    from mlx_slim.config import library
    from mlx_slim.planner.macs import SIZES
    from mlx_slim.units import human_bytes

    lines = [
        "| recipe | peak memory | " + " | ".join(f"{size} GB" for size in SIZES) + " |",
        "|---|---|" + "---|" * len(SIZES),
    ]
    for name in library.names("recipes"):
        prediction, smallest = on_a_mac(name)
        fits = (smallest is not None and smallest <= size for size in SIZES)
        marks = " | ".join("✓" if one else "–" for one in fits)
        lines.append(f"| {name} | {human_bytes(prediction.predicted_peak_bytes)} | {marks} |")
    return "\n".join(lines)


def _time(prediction: Prediction) -> str:
    from mlx_slim.units import human_duration

    if between := prediction.time_range:
        low, high = human_duration(between.low), human_duration(between.high)
        return f"between {low} and {high}, an estimate from {prediction.time_basis}"
    if prediction.predicted_seconds:
        return f"about {human_duration(prediction.predicted_seconds)} on this device"
    return "not predicted"


def _text(resolved: Resolved, prediction: Prediction, note: str) -> str:
    from mlx_slim.adapters.advice import rank_advice
    from mlx_slim.units import human_bytes, human_duration

    recipe, measured = resolved.recipe, prediction.measured
    fits = "fits" if prediction.fits else "does NOT fit"
    budget = human_bytes(prediction.budget_bytes)
    percent = 100 * prediction.trainable_parameters / max(1, prediction.parameters)
    tokens = "length unknown: the rows are on a hub, or too long to use"
    if prediction.tokens:
        tokens = f"{prediction.tokens:,} tokens, {prediction.tokens_basis}"
    disk = f"run folder up to {human_bytes(prediction.disk_bytes)}"
    if prediction.download_bytes:
        disk += f"; model download {human_bytes(prediction.download_bytes)}"
    peak = f"{human_bytes(prediction.predicted_peak_bytes)}, {fits} in {budget}"
    formulas = prediction.rules_of_thumb
    rows = [
        *(("old key", notice) for notice in resolved.notices),
        ("model", f"{recipe.model} ({prediction.parameters:,} parameters; {note})"),
        (
            "method",
            f"{recipe.method}, {prediction.trainable_parameters:,} trainable ({percent:.2f}%)",
        ),
        ("dtype", prediction.dtype),
        ("peak memory", f"{peak}{' (measured)' if measured else ''}"),
    ]
    if measured:
        off = measured.predicted_peak_bytes / measured.peak_bytes - 1
        rows.append(
            ("  predicted", f"{human_bytes(measured.predicted_peak_bytes)} ({off:+.1%})"),
        )
    rows += [
        *((f"  {name}", human_bytes(size)) for name, size in prediction.breakdown.items()),
        ("to load it", f"{human_bytes(prediction.loading_peak_bytes)}, a tensor at a time"),
        ("time", f"{_time(prediction)} ({tokens})"),
    ]
    if measured:
        pace = human_duration(measured.seconds_per_batch)
        pace += f" for {measured.batch_tokens:,} positions"
        rows.append(("  measured", f"{pace}, {measured.steps} steps of the largest batch"))
    rows += [
        ("disk", disk),
        (
            "for comparison",
            f"M = P*4/(32/Q)*1.2 (inference) says {human_bytes(formulas['inference_formula'])}; "
            f"12 x the model (full fine-tuning) {human_bytes(formulas['twelve_times'])}",
        ),
    ]
    steps = recipe.train.steps
    if steps is None and prediction.tokens:
        steps = prediction.tokens // (recipe.train.batch_tokens * recipe.train.accumulate)
    if advice := rank_advice(recipe, steps):
        rows.append(("rank", advice))
    lines = [f"{label:<15}{text}" for label, text in rows]
    if prediction.suggestions:
        title = "to use less" if prediction.fits else "to make it fit"
        lines += ["", f"{title}, cheapest first:"]
        width = max(len(s.set) for s in prediction.suggestions)
        for s in prediction.suggestions:
            cost = ", ".join(filter(None, [f"{s.time:.2f} x the time", s.cost]))
            over = "" if _fits(s, prediction) else "  (still too much)"
            size = human_bytes(s.predicted_peak_bytes)
            lines.append(f"  {s.set:<{width}}  {size:>8}  {cost}{over}")
    return "\n".join(lines)


@click.command(epilog="Example: mlx-slim plan tinyllama-lora --for m2-16gb")
@click.argument("recipe", required=False, shell_complete=recipe_names)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--budget", metavar="SIZE", help="Plan for this much memory, e.g. 16GB.")
@click.option("--for", "mac", metavar="MAC", help="Plan for a Mac, e.g. m2-16gb (see --macs).")
@click.option("--probe", is_flag=True, help="Measure three real steps of the largest batch here.")
@click.option(
    "--machines",
    type=Whole(2, 64),
    metavar="N",
    help="Plan for N such machines, with --link.",
)
@click.option(
    "--link",
    metavar="LINK",
    help="Between them: wifi, 1gbe, 10gbe, tb4, tb5, tb5-rdma, or measured: MB/s,µs.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--table", "as_table", is_flag=True, help="Show which recipes fit which Macs, or gain from N."
)
@click.option("--macs", "as_macs", is_flag=True, help="List the Macs that --for takes.")
def command(
    recipe: str | None,
    overrides: tuple[str, ...],
    budget: str | None,
    mac: str | None,
    probe: bool,
    machines: int | None,
    link: str | None,
    as_json: bool,
    as_table: bool,
    as_macs: bool,
) -> None:
    """Predict peak memory, time and disk of RECIPE (a name or a .yaml file)."""
    if as_macs:
        from mlx_slim.planner.macs import as_records, markdown

        click.echo(json.dumps(as_records(), indent=2) if as_json else markdown())
        return
    if as_table:
        from mlx_slim.planner.link_table import MAC, markdown

        with alive():
            text = table() if machines is None else markdown(machines, mac or MAC)
        click.echo(text)
        return
    if recipe is None:
        raise SlimError("no recipe is named", "mlx-slim recipes lists them")
    from mlx_slim.config.load import load_recipe
    from mlx_slim.planner.run import plan, shapes_of_run

    refuse_model(recipe)
    if (machines is None) != (link is None):
        raise SlimError(
            "--machines and --link belong to each other, and one is missing",
            "mlx-slim plan RECIPE --machines 2 --link tb4",
        )
    resolved = load_recipe(recipe, overrides)
    steps = None
    if probe:  # what trains imports mlx-lm
        from mlx_slim.finetuning.profile import probe as steps
    with alive_on_demand():
        prediction, note = plan(resolved.recipe, budget=budget, mac=mac, probe=steps)
    several = None
    if machines is not None and link is not None:
        from mlx_slim.planner.links import parse_link, several_machines

        parsed, slices = parse_link(link), None
        if resolved.recipe.train.shard == "full":
            with alive():
                again, _ = plan(resolved.recipe, budget=budget, mac=mac, ranks=machines)
            slices = again, shapes_of_run(resolved.recipe, again.dtype)
        several = several_machines(prediction, resolved.recipe, machines, parsed, slices)
    if as_json:
        record = {"schema_version": 1, "recipe": resolved.name, **prediction.as_record()}
        click.echo(json.dumps({**record, **({"machines": several.as_record()} if several else {})}))
    else:
        click.echo(_text(resolved, prediction, note))
        if several is not None:
            click.echo(_on_machines(several))
        command = "train" if resolved.recipe.distill is None else "distill"
        words = ["mlx-slim", command, recipe, *overrides]
        if not prediction.fits:
            fitting = [s for s in prediction.suggestions if _fits(s, prediction)]
            if not fitting:
                return
            words += fitting[0].set.split()
        show_next(step("run it", *words, "-o", f"runs/{resolved.name}"))


def _on_machines(several: SeveralMachines) -> str:
    """Return the lines about a run on several machines."""
    from mlx_slim.units import human_bytes

    def span(one: Range, unit: str) -> str:
        each = (one.low, one.high)
        low, high = (f"{value:,.0f}" if value >= 100 else f"{value:.2g}" for value in each)
        return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"

    gain = "" if several.speed_up is None else f"{span(several.speed_up, ' x as fast as one')}, "
    step = "" if several.step_seconds is None else f" of {span(several.step_seconds, ' s')} alone"
    slices = ", a slice of the model" if several.sharded else ""
    rows = [
        ("machines", f"{several.machines} over {several.link}: {gain}{several.verdict}"),
        (
            "  each",
            f"{human_bytes(several.peak_bytes)} of memory{slices}; sends "
            f"{human_bytes(several.sent_bytes)} a step, {span(several.link_seconds, ' s')}{step}",
        ),
    ]
    return "\n".join(["", *(f"{label:<15}{text}" for label, text in rows)])


def _fits(suggestion: Suggestion, prediction: Prediction) -> bool:
    return suggestion.predicted_peak_bytes <= prediction.budget_bytes

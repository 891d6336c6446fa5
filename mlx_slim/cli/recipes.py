"""``mlx-slim recipes``: the shipped run configurations.

Invariant: what is shown is the file that ``train`` reads; a copy is a complete recipe that depends
on no other file. Try it: ``mlx-slim recipes tinyllama-lora``.
"""

from __future__ import annotations

from pathlib import Path

import click

from mlx_slim.cli.options import alive, show_next
from mlx_slim.errors import SlimError
from mlx_slim.next_steps import step


def _list() -> None:
    from mlx_slim.cli.plan import on_a_mac
    from mlx_slim.config import library
    from mlx_slim.config.load import load_recipe
    from mlx_slim.progress import tracked
    from mlx_slim.runtime import human_bytes

    rows = [("recipe", "method", "memory", "model")]
    with alive():
        for name in tracked(library.names("recipes"), "predicting", "recipes"):
            recipe = load_recipe(name).recipe
            peak = human_bytes(on_a_mac(name)[0].predicted_peak_bytes)
            rows.append((name, recipe.method, peak, recipe.model))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())
    click.echo(
        "\nmemory: predicted peak on the smallest Mac that holds it (bfloat16); "
        "for this machine: mlx-slim plan RECIPE"
    )
    show_next(
        step("read one", "mlx-slim", "recipes", rows[1][0]),
        step("see what it costs here", "mlx-slim", "plan", "smollm2-lora"),
        step("make one your own", "mlx-slim", "recipes", "smollm2-lora", "--copy", "mine.yaml"),
    )


def _copy(name: str, path: Path) -> None:
    """Write the recipe, with the recipes that it extends merged, to ``path``.

    Raises:
        SlimError: If ``path`` exists, or is not a ``.yaml`` file.
    """
    import yaml

    from mlx_slim.artifacts import write_text
    from mlx_slim.config import library
    from mlx_slim.config.load import load_recipe

    if path.suffix not in (".yaml", ".yml"):
        raise SlimError(f"{path} is not a .yaml file", f"try --copy {path}.yaml")
    if path.exists():
        raise SlimError(f"{path} exists already", "choose another name")
    recipe = load_recipe(name).recipe
    source = library.find("recipes", name).read_text(encoding="utf-8")
    header = [line for line in source.splitlines() if line.startswith("#")]
    values = recipe.model_dump(exclude_unset=True)
    body = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    write_text(path, "\n".join(header) + "\n" + body, replace=False)


@click.command(epilog="Example: mlx-slim recipes smollm2-lora --copy mine.yaml")
@click.argument("name", required=False)
@click.option("--copy", "path", type=click.Path(path_type=Path), help="Write it to a .yaml file.")
def command(name: str | None, path: Path | None) -> None:
    """List the recipes; show recipe NAME, or copy it to a file of your own."""
    from mlx_slim.config import library

    if name is None:
        if path is not None:
            raise SlimError("--copy needs the name of a recipe", "mlx-slim recipes lists them")
        _list()
    elif path is not None:
        _copy(name, path)
        click.echo(f"{path}: change it, then mlx-slim train {path} -o RUN")
    else:
        click.echo(library.find("recipes", name).read_text(encoding="utf-8").rstrip())
        show_next(step("run it", "mlx-slim", "train", name, "-o", f"runs/{name}"))

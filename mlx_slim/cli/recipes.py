"""``mlx-slim recipes``: the shipped run configurations.

Invariant: what is shown is the file that ``train`` reads; a copy is a complete recipe that depends
on no other file. Try it: ``mlx-slim recipes tinyllama-lora``.
"""

from __future__ import annotations

import re
from pathlib import Path

import click

from mlx_slim.cli.options import show_columns, show_next
from mlx_slim.errors import SlimError
from mlx_slim.next_steps import step

_PEAK = re.compile(r"^# Predicted on a Mac \(bfloat16\): peak memory (.+?), fits ", re.MULTILINE)


def _list() -> None:
    from mlx_slim.config import library
    from mlx_slim.config.layers import read_files

    rows = [("recipe", "method", "memory", "model")]
    for name in library.names("recipes"):
        # The tests check shipped recipes: a check here would take half of the time.
        recipe = read_files(name, "recipes").values
        # The planner's figure, as a test holds: predicting it here would import MLX.
        peak = _PEAK.search(library.find("recipes", name).read_text(encoding="utf-8"))
        rows.append((name, recipe["method"], peak[1] if peak else "", recipe["model"]))
    show_columns(rows)
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

    from mlx_slim.config import library
    from mlx_slim.config.load import load_recipe

    recipe = load_recipe(name).recipe
    source = library.find("recipes", name).read_text(encoding="utf-8")
    header = [line for line in source.splitlines() if line.startswith("#")]
    values = recipe.model_dump(exclude_unset=True)
    body = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    _write(path, "\n".join(header) + "\n" + body)


def _write(path: Path, text: str) -> None:
    """Write a recipe to a new file.

    Raises:
        SlimError: If ``path`` exists, or is not a ``.yaml`` file.
    """
    from mlx_slim.artifacts import write_text

    if path.suffix not in (".yaml", ".yml"):
        raise SlimError(f"{path} is not a .yaml file", f"try {path}.yaml")
    if path.exists():
        raise SlimError(f"{path} exists already", "choose another name")
    write_text(path, text, replace=False)


def _convert(file: Path, path: Path | None) -> None:
    """Print the recipe of an mlx_lm.lora configuration, or write it and print what differs."""
    from mlx_slim.finetuning.mlx_lm_config import read_mlx_lm

    _, text, translation = read_mlx_lm(file)
    if path is None:
        click.echo(text.rstrip())
    else:
        _write(path, text)
        for line in translation.differences:
            click.echo(f"differs: {line}")
        for line in translation.absent:
            click.echo(f"no counterpart: {line}")
    name = path or "FILE.yaml"
    show_next(step("see what it costs", "mlx-slim", "plan", name))


@click.command(epilog="Example: mlx-slim recipes smollm2-lora --copy mine.yaml")
@click.argument("name", required=False)
@click.option(
    "--copy", "-o", "path", type=click.Path(path_type=Path), help="Write it to a .yaml file."
)
@click.option(
    "--from-mlx-lm",
    "foreign",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Read a configuration of mlx_lm.lora as a recipe, and say what differs.",
)
def command(name: str | None, path: Path | None, foreign: Path | None) -> None:
    """List the recipes; show recipe NAME, or copy it to a file of your own."""
    from mlx_slim.config import library

    if foreign is not None:
        if name is not None:
            raise SlimError(
                f"{name} and --from-mlx-lm {foreign} are two recipes", "name one of them"
            )
        _convert(foreign, path)
    elif name is None:
        if path is not None:
            raise SlimError("--copy needs the name of a recipe", "mlx-slim recipes lists them")
        _list()
    elif path is not None:
        _copy(name, path)
        click.echo(f"wrote {path}: edit it, then mlx-slim train {path} -o RUN")
    else:
        click.echo(library.find("recipes", name).read_text(encoding="utf-8").rstrip())
        show_next(step("run it", "mlx-slim", "train", name, "-o", f"runs/{name}"))

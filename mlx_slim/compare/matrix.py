"""The matrix of experiments: models × methods × tasks, as read from a file.

Invariant: all cells share one data set, template, order and truncation (``recipe.data`` is in
one place, and a model or method that changes it is refused); a cell that cannot be made is listed
with its reason, and the others run. Try it: ``mlx-slim compare matrix-tiny --dry-run``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mlx_slim.compare.matrix_spec import MatrixSpec
from mlx_slim.compare.options import CompareOptions
from mlx_slim.compare.records import Kind
from mlx_slim.config import library
from mlx_slim.config.load import Resolved, from_layers, read_layers
from mlx_slim.config.problems import checked
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.pruning.options import PruneOptions
from mlx_slim.reading import JsonObject

# Kinds that leave a model of their own, which another method can start from.
_WHOLE = ("pruned", "fused", "tuned")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Cell:
    """One experiment.

    Attributes:
        name: Its folder's name.
        model: Key of ``MatrixSpec.models``.
        method: Key of ``MatrixSpec.methods``.
        kind: Of the method.
        seed: Of training; None where nothing is trained.
        recipe: Of tuned cells, and what ``quantized`` ones are quantized with. The model is its
            source still: preparing replaces it by a folder.
        rates: Learning rates to choose from; empty where the recipe's own holds.
        parent: The cell whose adapters a fused one merges, whose model another one starts from.
    """

    name: str
    model: str
    method: str
    kind: Kind
    seed: int | None
    recipe: Resolved
    rates: tuple[float, ...] = ()
    parent: str | None = None


@dataclass(frozen=True)
class MatrixPlan:
    """The cells of a matrix in the order to run them, and those that cannot be.

    Attributes:
        matrix: As read.
        name: Of the file.
        cells: A parent stands before its children.
        omitted: (model, method, why): left out on purpose.
        refused: (cell, why): wrong in the file; the others run.
        notices: One line for each key of the file that has an old name.
    """

    matrix: MatrixSpec
    name: str
    cells: list[Cell]
    omitted: list[tuple[str, str, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    notices: tuple[str, ...] = ()


def load_matrix(
    name_or_path: str, overrides: Sequence[str] = (), *, limit: int | None = CompareOptions.limit
) -> MatrixPlan:
    """Return the cells that a file asks for.

    Args:
        name_or_path: A shipped matrix's name, or the path of a ``.yaml`` file.
        overrides: Dotted assignments: ``recipe.train.steps=2``, ``seeds=[0]``.
        limit: Questions of each task at most, for trying.

    Raises:
        SlimError: If the file cannot be read, or has wrong keys or values.
    """
    text = str(name_or_path)
    layers = read_layers(text, overrides, MatrixSpec, "matrices")
    what, problems = f"matrix {text}", layers.problems
    matrix = checked(MatrixSpec, layers.values, layers.origins, problems, what, layers.aliases)
    if limit is not None:
        tasks = [t.model_copy(update={"limit": min(limit, t.limit or limit)}) for t in matrix.tasks]
        matrix = matrix.model_copy(update={"tasks": tasks})
    _check(matrix, text)
    return expand(matrix, layers.file.stem, layers.notices)


def _check(matrix: MatrixSpec, text: str) -> None:
    """Refuse what concerns the whole matrix: names, data in two places, a repeated task."""
    problems = [
        f"{what}.{name}: a name has letters, digits, '.', '_' and '-' only"
        for what in ("models", "methods")
        for name in getattr(matrix, what)
        if not _NAME.fullmatch(name)
    ]
    for what in ("models", "methods"):
        problems += [
            f"{what}.{name}.recipe.data: all cells share one data set; set recipe.data instead"
            for name, entry in getattr(matrix, what).items()
            if "data" in entry.recipe
        ]
    tasks = [entry.task for entry in matrix.tasks]
    problems += [f"tasks: {t} is listed twice" for t in dict.fromkeys(tasks) if tasks.count(t) > 1]
    for entry in matrix.omit:
        for key, entries in (("model", matrix.models), ("method", matrix.methods)):
            if (name := getattr(entry, key)) not in entries:
                problems.append(f"omit: no {key} {name!r}: {did_you_mean(name, entries)}")
    if len(problems) == 1:
        raise SlimError(f"matrix {text}: {problems[0]}")
    if problems:
        raise SlimError(f"matrix {text}: {len(problems)} problems", details=problems)


def expand(matrix: MatrixSpec, name: str, notices: Sequence[str] = ()) -> MatrixPlan:
    """Return the cells of a checked matrix, those left out, and those that it cannot have."""
    layout = MatrixPlan(matrix, name, [], notices=tuple(notices))
    skipped = {(entry.model, entry.method): entry.why for entry in matrix.omit}
    for model, entry in matrix.models.items():
        methods = list(matrix.methods) if entry.methods is None else entry.methods
        for method in dict.fromkeys(methods):
            if method not in matrix.methods:
                hint = did_you_mean(method, matrix.methods)
                layout.refused.append((f"{model}-{method}", f"no method {method!r}: {hint}"))
            elif (model, method) in skipped:
                layout.omitted.append((model, method, skipped[model, method]))
            else:
                _add(layout, model, method)
    return layout


def _add(layout: MatrixPlan, model: str, method: str) -> None:
    """Add the cells of a model and a method: one a seed, or one."""
    matrix = layout.matrix
    for seed in matrix.seeds if _seeded(matrix, method) else [None]:
        name = f"{model}-{method}" + ("" if seed is None else f"-s{seed}")
        if any(cell.name == name for cell in layout.cells):
            layout.refused.append((name, "two cells have this name: rename a model or a method"))
            continue
        try:
            layout.cells.append(_cell(layout, model, method, seed, name))
        except SlimError as error:
            why = "; ".join([error.message, *error.details])
            layout.refused.append((name, why + (f" ({error.hint})" if error.hint else "")))


def _seeded(matrix: MatrixSpec, method: str) -> bool:
    """Return whether cells of a method differ by seed: something is trained, here or before."""
    above = list(matrix.methods)
    while True:
        entry = matrix.methods[method]
        if entry.kind in ("tuned", "fused"):
            return True
        earlier = above[: above.index(method)]
        if entry.of not in earlier:
            return False
        method = entry.of


def _cell(layout: MatrixPlan, model: str, method: str, seed: int | None, name: str) -> Cell:
    matrix, entry = layout.matrix, layout.matrix.methods[method]
    parent = None
    if entry.kind == "fused" or entry.of is not None:
        parent = _parent(layout, model, method, seed)
    if entry.kind == "pruned":
        prune_options(matrix, method)
    recipe = cell_recipe(matrix, model, method, seed, name)
    rates = tuple(dict.fromkeys(entry.learning_rates)) if entry.kind == "tuned" else ()
    return Cell(name, model, method, entry.kind, seed, recipe, rates, parent)


def _parent(layout: MatrixPlan, model: str, method: str, seed: int | None) -> str:
    """Return the name of the cell that a cell starts from.

    Raises:
        SlimError: If there is none, or it is of the wrong kind.
    """
    methods = layout.matrix.methods
    entry, fuses = methods[method], methods[method].kind == "fused"
    if entry.kind == "base":
        raise SlimError(
            f"methods.{method}.of: kind: base is the model itself, made from no other",
            "remove the key",
        )
    above = list(methods)[: list(methods).index(method)]
    kinds = ("tuned",) if fuses else _WHOLE
    if entry.of not in above or methods[entry.of].kind not in kinds:
        candidates = [key for key in above if methods[key].kind in kinds]
        what = "no tuned method above it" if fuses else f"no {_either(kinds)} method above it"
        raise SlimError(
            f"methods.{method}.of is {entry.of!r}, {what}", _one_of(entry.of, candidates)
        )
    parent = f"{model}-{entry.of}" + (f"-s{seed}" if _seeded(layout.matrix, entry.of) else "")
    start = next((cell for cell in layout.cells if cell.name == parent), None)
    if start is None:
        raise SlimError(f"there is no cell {parent} to {'fuse' if fuses else 'start from'}")
    whole = start.recipe.recipe.method == "full"
    if fuses and whole:
        raise SlimError(f"{parent} is tuned in full: it has no adapters to fuse")
    if not fuses and start.kind == "tuned" and not whole:
        raise SlimError(f"{parent} is an adapter, not a whole model", "fuse it first: kind: fused")
    return parent


def _either(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _one_of(name: str | None, names: list[str]) -> str:
    return did_you_mean(name or "", names) if names else ""


def cell_recipe(
    matrix: MatrixSpec,
    model: str,
    method: str,
    seed: int | None,
    name: str,
    changes: JsonObject | None = None,
) -> Resolved:
    """Return the recipe of a cell: method's part, what all share, the method, the model, the seed.

    Args:
        matrix: The matrix.
        model: Key of its models.
        method: Key of its methods.
        seed: Of training, None where nothing is trained.
        name: Of the recipe.
        changes: Laid over everything, such as the chosen learning rate.

    Raises:
        SlimError: If a key or value is wrong.
    """
    entry, way = matrix.models[model], matrix.methods[method]
    layers: list[tuple[JsonObject | str, str]] = []
    if way.extends is not None:
        layers.append((way.extends, way.extends))
    layers.append((located(matrix.recipe), "recipe"))
    layers.append((way.recipe, f"methods.{method}.recipe"))
    layers.append((entry.recipe, f"models.{model}.recipe"))
    layers.append(({"model": entry.source, "revision": entry.revision}, f"models.{model}"))
    if seed is not None:
        layers.append(({"train": {"seed": seed}}, "seeds"))
    if len(way.learning_rates) == 1:
        rate = {"train": {"learning_rate": way.learning_rates[0]}}
        layers.append((rate, f"methods.{method}.learning_rates"))
    if changes:
        layers.append((changes, "compare"))
    return from_layers(layers, name)


def prune_options(matrix: MatrixSpec, method: str) -> PruneOptions:
    """Return the options of a pruned method.

    Raises:
        SlimError: If one is unknown or wrong.
    """
    values = matrix.methods[method].prune
    names = [field.name for field in fields(PruneOptions)]
    problems = [(key, did_you_mean(key, names)) for key in values if key not in names]
    try:
        options = TypeAdapter(PruneOptions).validate_python(values)
    except ValidationError as error:
        problems += [(".".join(map(str, e["loc"])), e["msg"]) for e in error.errors()]
    else:
        if not problems:
            return options
    raise SlimError("; ".join(f"methods.{method}.prune.{key}: {why}" for key, why in problems))


def located(recipe: JsonObject) -> JsonObject:
    """Return recipe values with ``evals/…`` data paths pointing at the shipped files."""
    data = recipe.get("data")
    if not isinstance(data, dict):
        return recipe

    def place(path: Any) -> Any:
        if isinstance(path, list):
            return [
                {**item, "path": place(item.get("path"))} if isinstance(item, dict) else item
                for item in path
            ]
        shipped = isinstance(path, str) and path.startswith("evals/") and not Path(path).exists()
        return str(library.folder("evals").parent / path) if shipped else path

    return {**recipe, "data": {**data, "path": place(data.get("path", "tatsu-lab/alpaca"))}}

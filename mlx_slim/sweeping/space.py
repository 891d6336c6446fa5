"""The space of a sweep: ranges and choices of recipe keys, read from a file.

Invariant: a key, a range or a choice that the recipe would refuse is refused before anything runs,
with the line it stands on; a point of the space is a recipe that the schema has checked. A file is
a mapping of dotted recipe keys, each a list of choices or a range:

    adapter.rank: [4, 8, 16]
    train.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
    train.batch_tokens: {low: 512, high: 2048, step: 512}

Whether a range holds whole numbers follows from its key. Try it: ``mlx-slim sweep``, which lists
the shipped ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_slim.config import library
from mlx_slim.config.aliases import RECIPE, current_path
from mlx_slim.config.layers import COMMAND_LINE
from mlx_slim.config.load import Resolved, from_layers
from mlx_slim.config.problems import words_for
from mlx_slim.config.read import read_mapping
from mlx_slim.config.recipe_file import value_text
from mlx_slim.config.schema import Recipe
from mlx_slim.config.values import MOST
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.finetuning.run_dir import FREE_ON_RESUME
from mlx_slim.reading import JsonObject, short, shown

Number = int | float
Point = Mapping[str, Any]  # dotted key -> JSON value

_RANGE = ("low", "high", "log", "step")
_SELECTION = "losses are compared on the same validation rows, as often validated"
# Keys that a sweep needs to be the same in every trial, and why.
_FIXED = {
    "data.validation": _SELECTION,
    "data.seed": _SELECTION,
    "train.validate_every": _SELECTION,
    "train.seed": "the best trial is run again on other seeds (--seeds)",
    **dict.fromkeys(FREE_ON_RESUME, "it does not change what a run learns"),
}


@dataclass(frozen=True)
class Parameter:
    """A key of the recipe and what it may be.

    Attributes:
        key: Dotted.
        choices: JSON values; None for a range.
        low: Least number of a range.
        high: Largest.
        log: Whether its logarithm is uniform.
        step: Distance of two numbers; None is 1 for whole numbers, else any.
        whole: Whether it holds whole numbers.
    """

    key: str
    choices: tuple[Any, ...] | None = None
    low: Number = 0
    high: Number = 0
    log: bool = False
    step: Number | None = None
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        """Return whether a JSON value is in the range, or one of the choices."""
        if self.choices is not None:
            return any(value == choice for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return self.low <= value <= self.high and (
            self.step is None or _multiple(value - self.low, self.step)
        )

    def text(self) -> str:
        """Return it in words, as in the file."""
        if self.choices is not None:
            return ", ".join(map(value_text, self.choices))
        more = (", log" if self.log else "") + (f", step {self.step:g}" if self.step else "")
        return f"{self.low:g} to {self.high:g}{more}"


@dataclass(frozen=True)
class SweepSpace:
    """Parameters over a recipe.

    Attributes:
        parameters: At least one, in the order of the file.
        base: The recipe that they change.
        origin: Where they are from, for messages.
    """

    parameters: tuple[Parameter, ...]
    base: Resolved
    origin: str

    @property
    def keys(self) -> list[str]:
        """The dotted keys, in order."""
        return [one.key for one in self.parameters]

    def recipe(self, point: Point) -> Resolved:
        """Return the recipe with the values of ``point``.

        Raises:
            SlimError: If they exclude each other.
        """
        return changed_recipe(self.base, point, self.origin)

    def baseline_point(self) -> Point | None:
        """Return the recipe's own values, if they lie in the space."""
        values = self.base.recipe.model_dump(mode="json")
        point = {one.key: _at(values, one.key) for one in self.parameters}
        inside = all(point[one.key] in one for one in self.parameters)
        return point if inside else None

    def as_json(self) -> list[JsonObject]:
        """Return the parameters as JSON values."""
        return [json.loads(json.dumps(asdict(one))) for one in self.parameters]


def changed_recipe(base: Resolved, values: Point, origin: str) -> Resolved:
    """Return ``base`` with values of dotted keys laid over it.

    Raises:
        SlimError: If they are wrong, or exclude each other.
    """
    layers = [(base.recipe.model_dump(mode="json", exclude_unset=True), f"recipe {base.name}")]
    layers += [(_nested(key, value), origin) for key, value in values.items()]
    return from_layers(layers, base.name)


def load_space(name_or_path: str, base: Resolved) -> SweepSpace:
    """Return the space in a file over a recipe.

    Args:
        name_or_path: A shipped space's name, or the path of a ``.yaml`` file.
        base: The recipe.

    Raises:
        SlimError: Unreadable, or wrong keys, ranges or choices; with several of them the message
            counts them and ``details`` has one line each.
    """
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")) or "/" in text:
        file = Path(text)
    else:
        file = library.find("spaces", text)
    content, lines = read_mapping(file)
    if not content:
        raise SlimError(f"{short(file)} names no key", "write lines such as adapter.rank: [4, 8]")
    problems: list[str] = []
    parameters: dict[str, Parameter] = {}
    for name, value in content.items():
        path = current_path(tuple(name.split(".")), RECIPE)
        key, origin = ".".join(path), f"{file.name}:{lines[(name,)]}"
        try:
            parameter = _parameter(key, value, base, origin)
            if key in parameters:
                raise SlimError(f"{name} ({origin}) is {key}, which is given already")
            parameters[key] = parameter
        except SlimError as error:
            problem = f"{error.message}: {error.hint}" if error.hint else error.message
            problems += error.details or [problem.removeprefix(f"recipe {base.name}: ")]
    if not problems:
        problems = _rivals(parameters)
    if len(problems) == 1:
        raise SlimError(f"space {text}: {problems[0]}")
    if problems:
        raise SlimError(f"space {text}: {len(problems)} problems", details=problems)
    return SweepSpace(tuple(parameters.values()), base, file.name)


def _rivals(parameters: Mapping[str, Parameter]) -> list[str]:
    """Return a line for each pair of keys of which the recipe takes one."""
    pairs = (("adapter.alpha", "adapter.scale"), ("train.steps", "train.epochs"))
    return [
        f"{first} and {second} are both in the space: keep one, the other follows from it"
        for first, second in pairs
        if first in parameters and second in parameters
    ]


def _parameter(key: str, value: Any, base: Resolved, origin: str) -> Parameter:
    """Return a checked parameter.

    Raises:
        SlimError: One thing that is wrong with it.
    """
    place = f"{shown(key)[1:-1]} ({origin})"
    kinds = _kinds(key, value, origin)
    for fixed, why in _FIXED.items():
        if key == fixed or key.startswith(f"{fixed}."):
            raise SlimError(f"{place} cannot be searched", why)
    if base.origins.get(key) == COMMAND_LINE:
        raise SlimError(f"{place} is searched, and set on the command line", "keep one of the two")
    if isinstance(value, list):
        parameter = Parameter(key, choices=_choices(value, place))
    elif isinstance(value, dict):
        parameter = _range(key, value, kinds, place)
    else:
        raise SlimError(
            f"{place} is {shown(value)}", "write a list of choices, or {low: …, high: …}"
        )
    ends = (parameter.low, parameter.high) if parameter.choices is None else parameter.choices
    for one in ends:
        changed_recipe(base, {key: one}, origin)
    return parameter


def _kinds(key: str, value: Any, origin: str) -> set[str]:
    """Return the JSON types of a key that is to have a range or choices.

    Raises:
        SlimError: If the recipe has no such key, or it is a section.
    """
    path = tuple(key.split("."))
    words = words_for(Recipe, tuple(RECIPE.items()))
    _, unknown = words.screen(_nested(key, None), {path: origin})
    if unknown:
        raise SlimError(unknown[0])
    kinds = words.kinds_at(path)
    if "object" in kinds and not isinstance(value, list):
        raise SlimError(
            f"{key} ({origin}) is a section of keys, not a key",
            f"write {key}.NAME: one of its keys",
        )
    return kinds


def _choices(values: list[Any], place: str) -> tuple[Any, ...]:
    if len(values) < 2:
        raise SlimError(
            f"{place} has {len(values)} choices", "give two or more, or set it in the recipe"
        )
    for number, value in enumerate(values):
        if any(value == other for other in values[:number]):
            raise SlimError(f"{place}: {shown(value)} is given twice", "give each choice once")
    return tuple(values)


def _range(key: str, value: JsonObject, kinds: set[str], place: str) -> Parameter:
    for name in value:
        if name not in _RANGE:
            raise SlimError(
                f"{place}: {shown(name)} is not a key of a range", did_you_mean(name, _RANGE)
            )
    if not kinds & {"integer", "number"}:
        raise SlimError(f"{place} holds no numbers", "write a list of choices")
    whole = "number" not in kinds
    absent = [name for name in ("low", "high") if name not in value]
    if absent:
        raise SlimError(f"{place} has no {absent[0]}", "write {low: …, high: …}")
    low, high, step = (_number(value, name, whole, place) for name in ("low", "high", "step"))
    assert low is not None and high is not None
    log = value.get("log", False)
    if not isinstance(log, bool):
        raise SlimError(f"{place}: log is {shown(log)}", "write true or false")
    if low > high:
        raise SlimError(f"{place}: low {low:g} is above high {high:g}", "exchange them")
    if low == high:
        raise SlimError(f"{place}: low and high are both {low:g}", "set it in the recipe instead")
    if log and low <= 0:
        raise SlimError(f"{place}: low is {low:g}, and log needs one above 0", "raise low")
    if step is not None:
        _check_step(low, high, step, log, place)
    return Parameter(key, None, low, high, log, step, whole)


def _number(value: JsonObject, name: str, whole: bool, place: str) -> Number | None:
    number = value.get(name)
    if number is None and name == "step":
        return None
    kind = int if whole else int | float
    if isinstance(number, bool) or not isinstance(number, kind) or not math.isfinite(number):
        expected = "a whole number" if whole else "a number"
        raise SlimError(f"{place}: {name} is {shown(number)}, expected {expected}")
    return number if whole else float(number)


def _check_step(low: Number, high: Number, step: Number, log: bool, place: str) -> None:
    if log:
        raise SlimError(f"{place} has log and a step", "drop one of them")
    if not (high - low) / MOST <= step <= high - low:
        raise SlimError(
            f"{place}: step is {step:g}, expected from {(high - low) / MOST:g} to {high - low:g}",
            "change it",
        )
    if not _multiple(high - low, step):
        last = low + step * math.floor((high - low) / step)
        raise SlimError(
            f"{place}: {high:g} is not {low:g} and whole steps of {step:g}", f"set high to {last:g}"
        )


def _multiple(distance: Number, step: Number) -> bool:
    return math.isclose(distance / step, round(distance / step), abs_tol=1e-9)


def _nested(key: str, value: Any) -> JsonObject:
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return nested


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values

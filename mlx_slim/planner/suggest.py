"""Changes of a recipe that lower its peak memory, ranked by what they cost.

Invariant: a suggestion's ``set`` can be pasted on the command line, where it is predicted to need
the memory given here. Changes that only take longer come before those that change the result, in
the order of ``COSTS``; within each, the shorter time first. Try it:
``mlx-slim plan tinyllama-lora --budget 6GB``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlx_slim.config.schema import Recipe
from mlx_slim.errors import SlimError

# Costs of a change besides time, in ascending order.
COSTS = (
    "",
    "another optimizer",
    "rows over 256 tokens are dropped",
    "a 4-bit base",
    "adapters instead of all weights",
)
_NOTHING, _OPTIMIZER, _ROWS, _FOUR_BIT, _ADAPTERS = COSTS
# dotted recipe key -> value
Overrides = dict[str, bool | int | str]
WORTH = 0.97  # a change must save at least 3%


@dataclass(frozen=True)
class Suggestion:
    """Overrides that lower the peak: ``set`` can be pasted on the command line.

    Attributes:
        set: ``key=value``, several with spaces between.
        predicted_peak_bytes: With it.
        time: Predicted seconds with it, as a multiple of those without.
        cost: The cost besides time, as text; empty if there is none.
    """

    set: str
    predicted_peak_bytes: int
    time: float = 1.0
    cost: str = ""

    @property
    def changes_result(self) -> bool:
        """Whether the run learns something else with it; without, it only takes longer."""
        return self.cost != _NOTHING


def _variants(recipe: Recipe) -> list[tuple[Overrides, str]]:
    """Return changes that may lower the peak, each with its cost besides time."""
    train = recipe.train
    options: list[tuple[Overrides, str]] = []

    def smaller(factor: int) -> Overrides:
        """Return the same step in ``factor`` times as many micro-batches."""
        tokens = max(train.max_length, train.batch_tokens // factor)
        times = -(-train.batch_tokens // tokens)
        return {"train.batch_tokens": tokens, "train.accumulate": train.accumulate * times}

    checkpoint: Overrides = {} if train.grad_checkpoint else {"train.grad_checkpoint": True}
    pieces = [p for p in (2, 4, 8) if train.batch_tokens // p >= train.max_length]
    options += [(smaller(p), _NOTHING) for p in pieces]
    options.append((checkpoint, _NOTHING))
    if train.batching == "packed":  # its mask of segments costs a Mac the fused attention
        options.append(({"train.batching": "grouped"}, _NOTHING))
    options += [({**checkpoint, **smaller(p)}, _NOTHING) for p in pieces]
    if train.max_length > 256:
        least = {"train.max_length": 256, "train.batch_tokens": min(train.batch_tokens, 512)}
        options.append(({**checkpoint, **least}, _ROWS))
    if recipe.method == "full":
        options.append(({"train.optimizer": "adafactor"}, _OPTIMIZER))
        options.append(({"method": "lora"}, _ADAPTERS))
    if recipe.method != "qlora" and not recipe.quantize.qat:
        cost = _ADAPTERS if recipe.method == "full" else _FOUR_BIT
        options.append(({"method": "qlora"}, cost))
        options.append(({"method": "qlora", **checkpoint, **smaller(8)}, cost))
    unique: list[tuple[Overrides, str]] = []
    for change, cost in options:
        if change and all(change != other for other, _ in unique):
            unique.append((change, cost))
    return unique


def changed(recipe: Recipe, change: Overrides) -> Recipe:
    """Return ``recipe`` with other values, unchecked."""
    values: dict[str, object] = {}
    sections: dict[str, Overrides] = {}
    for key, value in change.items():
        section, _, name = key.rpartition(".")
        if section:
            sections.setdefault(section, {})[name] = value
        else:
            values[name] = value
    for section, update in sections.items():
        values[section] = getattr(recipe, section).model_copy(update=update)
    return recipe.model_copy(update=values)


def suggestions(
    recipe: Recipe, limit: int, cost_of: Callable[[Recipe], tuple[int, float]]
) -> list[Suggestion]:
    """Return changes that lower the peak: those that fit ``limit`` first, cheapest first.

    Args:
        recipe: To change.
        limit: Bytes.
        cost_of: Recipe -> (peak in bytes, seconds).
    """
    peak, seconds = cost_of(recipe)
    options: list[tuple[Overrides, Suggestion]] = []
    for change, cost in _variants(recipe):
        try:
            lower, longer = cost_of(changed(recipe, change))
        except SlimError:  # this model cannot be trained that way: no layer to adapt or to quantize
            continue
        if lower < WORTH * peak:
            text = " ".join(f"{name}={_yaml(value)}" for name, value in change.items())
            time = round(longer / max(seconds, 1e-9), 2)
            options.append((change, Suggestion(text, lower, time, cost)))

    def redundant(change: Overrides, suggestion: Suggestion) -> bool:
        """Return whether a subset of the change saves as much: micro-batches sum gradients."""
        return any(
            part.items() < change.items()
            and other.predicted_peak_bytes <= suggestion.predicted_peak_bytes
            and other.time <= suggestion.time
            for part, other in options
        )

    useful = (suggestion for change, suggestion in options if not redundant(change, suggestion))
    return sorted(useful, key=_rank(limit))


def _rank(limit: int) -> Callable[[Suggestion], tuple[bool, int, float]]:
    return lambda s: (s.predicted_peak_bytes > limit, COSTS.index(s.cost), s.time)


def _yaml(value: bool | int | str) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

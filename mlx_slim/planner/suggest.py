"""Changes of a recipe that lower its peak memory, ranked by what they cost.

Invariant: a suggestion's ``set`` goes on the command line as it is, and predicts there what it
promises here. What only takes longer stands before what changes the result, in the order of
``COSTS``; within each, the shorter time first. Try it:
``mlx-slim plan tinyllama-lora --budget 6GB``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_slim.config.schema import Recipe

# What a change may cost besides time, the least first.
COSTS = (
    "",
    "another optimizer",
    "rows over 256 tokens are lost",
    "a 4-bit base",
    "adapters instead of all weights",
)
_NOTHING, _OPTIMIZER, _ROWS, _FOUR_BIT, _ADAPTERS = COSTS
WORTH = 0.97  # a change that saves less than 3% is none


@dataclass(frozen=True)
class Suggestion:
    """Overrides that lower the peak: ``set`` goes on the command line as it is.

    Attributes:
        set: ``key=value``, several with spaces between.
        predicted_peak_bytes: With it.
        time: Predicted seconds with it, as a multiple of those without.
        cost: What it costs besides time, in words; empty if nothing.
    """

    set: str
    predicted_peak_bytes: int
    time: float = 1.0
    cost: str = ""


def _variants(recipe: Recipe) -> list[tuple[dict[str, Any], str]]:
    """Changes that may lower the peak, each with what it costs besides time."""
    train = recipe.train
    found: list[tuple[dict[str, Any], str]] = []

    def smaller(parts: int) -> dict[str, Any]:
        """Return the same step in ``parts`` times as many micro-batches."""
        tokens = max(train.max_length, train.batch_tokens // parts)
        times = -(-train.batch_tokens // tokens)
        return {"train.batch_tokens": tokens, "train.accumulate": train.accumulate * times}

    again: dict[str, Any] = {} if train.grad_checkpoint else {"train.grad_checkpoint": True}
    pieces = [p for p in (2, 4, 8) if train.batch_tokens // p >= train.max_length]
    found += [(smaller(p), _NOTHING) for p in pieces]
    found.append((again, _NOTHING))
    found += [({**again, **smaller(p)}, _NOTHING) for p in pieces]
    if train.max_length > 256:
        least = {"train.max_length": 256, "train.batch_tokens": min(train.batch_tokens, 512)}
        found.append(({**again, **least}, _ROWS))
    if recipe.method == "full":
        found.append(({"train.optimizer": "adafactor"}, _OPTIMIZER))
        found.append(({"method": "lora"}, _ADAPTERS))
    if recipe.method != "qlora" and not recipe.quantize.qat:
        cost = _ADAPTERS if recipe.method == "full" else _FOUR_BIT
        found.append(({"method": "qlora"}, cost))
        found.append(({"method": "qlora", **again, **smaller(8)}, cost))
    unique: list[tuple[dict[str, Any], str]] = []
    for change, cost in found:
        if change and all(change != known for known, _ in unique):
            unique.append((change, cost))
    return unique


def _changed(recipe: Recipe, change: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
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
    """Return what lowers the peak; what fits ``limit`` stands first, cheapest first.

    Args:
        recipe: To change.
        limit: Bytes.
        cost_of: Recipe -> (peak in bytes, seconds).
    """
    peak, seconds = cost_of(recipe)
    found: list[tuple[dict[str, Any], Suggestion]] = []
    for change, cost in _variants(recipe):
        lower, longer = cost_of(_changed(recipe, change))
        if lower < WORTH * peak:
            text = " ".join(f"{name}={_yaml(value)}" for name, value in change.items())
            time = round(longer / max(seconds, 1e-9), 2)
            found.append((change, Suggestion(text, lower, time, cost)))

    def needless(change: dict[str, Any], made: Suggestion) -> bool:
        """Return whether a part of it does as much: pieces keep gradients between them."""
        return any(
            part.items() < change.items()
            and other.predicted_peak_bytes <= made.predicted_peak_bytes
            and other.time <= made.time
            for part, other in found
        )

    return sorted((made for change, made in found if not needless(change, made)), key=_rank(limit))


def _rank(limit: int) -> Callable[[Suggestion], tuple[bool, int, float]]:
    return lambda s: (s.predicted_peak_bytes > limit, COSTS.index(s.cost), s.time)


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

"""Suggestions, ranked by their costs."""

from __future__ import annotations

from typing import Any

from mlx_slim.config.schema import Recipe
from mlx_slim.errors import SlimError
from mlx_slim.planner.suggest import COSTS, suggestions


def price(recipe: Recipe) -> tuple[int, float]:
    """A device where memory is tokens, and checkpointing takes a third longer."""
    train = recipe.train
    bytes_of = {"full": 4000, "lora": 1000, "dora": 1100, "qlora": 300}[recipe.method]
    activations = train.batch_tokens * (0.2 if train.grad_checkpoint else 1.0)
    optimizer = -1000 if train.optimizer == "adafactor" else 0
    return int(bytes_of + activations + optimizer), 4.0 / 3 if train.grad_checkpoint else 1.0


def ranked(limit: int, method: str = "lora", **train: Any) -> list[Any]:
    recipe = Recipe(model="x", method=method, train=train)  # pyright: ignore[reportArgumentType]
    return suggestions(recipe, limit, price)


def test_what_fits_stands_first_then_what_costs_least() -> None:
    prediction = ranked(3200)
    assert prediction[0].set == "train.batch_tokens=2048 train.accumulate=2"
    assert (prediction[0].time, prediction[0].cost) == (1.0, "")
    fit = [s.predicted_peak_bytes <= 3200 for s in prediction]
    assert fit == sorted(fit, reverse=True)
    inside = [(COSTS.index(s.cost), s.time) for s in prediction if s.predicted_peak_bytes <= 3200]
    assert inside == sorted(inside)
    assert all(s.predicted_peak_bytes < 0.97 * 5096 for s in prediction)


def test_a_smaller_optimizer_costs_less_than_giving_up_full_tuning() -> None:
    costs = [s.cost for s in ranked(10**6, "full") if s.cost]
    assert costs.index("another optimizer") < costs.index("adapters instead of all weights")
    assert "a 4-bit base" not in costs


def test_no_change_with_a_part_that_does_as_much() -> None:
    def pieces_cost(recipe: Recipe) -> tuple[int, float]:
        peak, time = price(recipe)
        return peak + (3000 if recipe.train.accumulate > 1 else 0), time

    train: Any = {"batch_tokens": 4096, "accumulate": 1}
    recipe = Recipe(model="x", method="full", train=train)
    both = "train.grad_checkpoint=true train.batch_tokens=2048 train.accumulate=2"
    assert both in [s.set for s in suggestions(recipe, 10**6, price)]
    prediction = [s.set for s in suggestions(recipe, 10**6, pieces_cost)]
    assert "train.grad_checkpoint=true" in prediction and both not in prediction


def test_what_a_model_cannot_do_is_not_suggested() -> None:
    def priced(recipe: Recipe) -> tuple[int, float]:
        if recipe.method != "full":
            raise SlimError("no layer to adapt")
        return price(recipe)

    recipe = Recipe(model="x", method="full")  # pyright: ignore[reportCallIssue]
    changes = [one.set for one in suggestions(recipe, 0, priced)]
    assert changes
    assert not any("method=" in change for change in changes)


def test_a_recipe_that_is_small_already_gets_no_empty_advice() -> None:
    prediction = ranked(10, "qlora", batch_tokens=256, max_length=256, grad_checkpoint=True)
    assert prediction == []

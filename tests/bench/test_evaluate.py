"""How far the answers of two scorers are apart."""

from __future__ import annotations

from mlx_slim.bench.evaluate import agreement


def test_texts_are_compared_by_equality() -> None:
    assert agreement(["a", "b"], ["a", "c"]) == {"questions": 2, "same_text": 1}


def test_choices_are_compared_by_prediction_and_by_difference() -> None:
    ours, theirs = [[-1.0, -2.0], [-3.0, -2.5]], [[-1.1, -2.0], [-2.0, -2.5]]
    assert agreement(ours, theirs) == {
        "questions": 2, "same_prediction": 1, "largest_difference_nats": 1.0,
    }  # fmt: skip

"""Recovery in percent of the original, and the accuracy of guessing."""

from __future__ import annotations

import pytest

from mlx_slim.pruning.records import ModelRow, TaskFigures
from mlx_slim.pruning.report import chance, with_recovery


def test_recovery_in_percent_of_the_original() -> None:
    def row(**metrics: float) -> ModelRow:
        return ModelRow("x", 1, 1, 0, {"t": TaskFigures(4, metrics, 0.25)})

    rows = with_recovery([row(acc=score, f1=score) for score in (0.75, 0.5, 0.25)])
    recovery = [row.tasks["t"].recovery for row in rows]
    assert [one["acc"].plain for one in recovery] == pytest.approx([100, 200 / 3, 100 / 3])
    assert [one["acc"].chance_corrected for one in recovery] == pytest.approx([100, 50, 0])
    assert recovery[0]["f1"].chance_corrected is None
    (at_chance,) = with_recovery([row(acc=0.25)])
    assert at_chance.tasks["t"].recovery["acc"].chance_corrected is None
    assert chance([{"loglikelihoods": [0, 1]}, {"loglikelihoods": [0] * 4}]) == 0.375
    assert chance([{"generation": "x"}]) == 0.0

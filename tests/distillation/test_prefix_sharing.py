"""A student on cached logits: rows that share their beginnings learn what rows one by one do."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_slim.config.load import from_values
from mlx_slim.distillation.run import distill
from tests.finetuning.test_prefix_sharing import computed, rows_with_a_system_message
from tests.support.runs import Recorder, losses, recipe
from tests.support.tiny import TinyModels, tiny_model


def test_losses_are_those_of_rows_one_by_one(tiny: TinyModels, tmp_path: Path) -> None:
    rows = rows_with_a_system_message(tmp_path / "rows.jsonl")
    values = recipe(tiny("llama"), rows).recipe.model_dump(exclude_unset=True)
    teacher = tiny_model(tmp_path / "teacher", seed=1)
    values["distill"] = {"teachers": [{"model": str(teacher)}], "top_k": 16}
    values["adapter"]["dropout"] = 0.0
    values["train"] |= {"steps": 3, "batch_tokens": 512, "batching": "grouped"}
    seen = {}
    for sharing in ("auto", False):
        values["train"]["prefix_sharing"] = sharing
        seen[sharing] = Recorder()
        out = tmp_path / str(sharing)
        distill(from_values(values, "small", "test"), out, observer=seen[sharing])
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "False"), rel=1e-5)
    assert computed(seen["auto"]) < 0.6 * computed(seen[False])

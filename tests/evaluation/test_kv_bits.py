"""Scores over rounded keys and values: recorded, resumed as begun, refused where impossible."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.evaluation.comparison import compare
from mlx_slim.evaluation.options import KVBits
from mlx_slim.evaluation.run import EvalOptions, evaluate
from tests.support.evals import samples_of, write_tasks
from tests.support.tiny import tiny_model

Files = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def test_kv_bits_change_the_scores_and_are_part_of_the_results(
    tasks: Files, tmp_path: Path
) -> None:
    model, names = tiny_model(tmp_path / "model", head_dim=32), [str(task) for task in tasks[:2]]
    choices: tuple[KVBits | None, ...] = (None, 4)
    outs: dict[KVBits | None, Path] = {bits: tmp_path / f"out-{bits}" for bits in choices}
    for bits, out in outs.items():
        evaluate(model, names, out, EvalOptions(limit=9, kv_bits=bits))
    results = {bits: json.loads((out / "results.json").read_text()) for bits, out in outs.items()}
    assert results[4]["kv_bits"] == 4
    assert "kv_bits" not in results[None]  # as before there was a choice
    for name in ("toy_choice", "toy_answer"):
        assert samples_of(outs[4], name) != samples_of(outs[None], name)
    assert any("settings differ: kv_bits" in note for note in compare(*outs.values()).notes)
    (outs[4] / "results.json").unlink()
    with pytest.raises(SlimError, match="kv_bits: 4 → None"):
        evaluate(model, names, outs[4], EvalOptions(limit=9), resume=True)
    evaluate(model, names, outs[4], EvalOptions(limit=9, kv_bits=4), resume=True)
    assert json.loads((outs[4] / "results.json").read_text()) == results[4]


def test_a_cache_that_cannot_be_quantized_is_refused_before_anything_is_written(
    tiny: Callable[..., Path], tasks: Files, tmp_path: Path
) -> None:
    with pytest.raises(SlimError, match="cannot keep its cache in 8 bits: its heads have 16"):
        evaluate(tiny(), [str(tasks[0])], tmp_path / "out", EvalOptions(kv_bits=8))
    assert not (tmp_path / "out").exists()

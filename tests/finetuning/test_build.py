"""How a run is built: which rows share a sequence, and what is predicted of that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.events import Broadcast
from mlx_slim.finetuning import build, run
from mlx_slim.finetuning.strategy import CrossEntropyStrategy
from mlx_slim.models.attention import Balance
from mlx_slim.planner import memory
from tests.support.runs import recipe, write_rows
from tests.support.tiny import tiny_model


@pytest.mark.parametrize("masked", [1e9, 50.0])
def test_auto_counts_the_mask_of_packed_rows(
    masked: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Mac: no scores are stored, but under the mask that keeps packed rows apart."""
    monkeypatch.setattr(build, "attention_balance", lambda *_, **__: Balance(1e9, masked))
    monkeypatch.setattr(memory, "fused_here", lambda: True)
    lengths = [*range(8, 40), 480]  # so thinly spread that a batch of like lengths needs padding
    rows = [{"prompt": "a", "completion": "b" * length} for length in lengths]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_model(tmp_path / "model", head_dim=64)
    train: dict[str, Any] = {"max_length": 512, "batch_tokens": 512}
    small = recipe(model, data, **train).recipe
    strategy = CrossEntropyStrategy()
    built = run._build(
        small, strategy, tmp_path / "run", Broadcast([]), budget=10**9, unchanged=False
    )
    mode = "packed" if masked == 1e9 else "grouped"
    assert built.loop.batcher.mode == mode
    peaks = {}
    for each in ("packed", "grouped"):
        other = recipe(model, data, batching=each, **train).recipe
        lengths = built.data.train.lengths.tolist()
        prediction = strategy.student.predict(other, built.tuned, lengths)
        peaks[each] = prediction.predicted_peak_bytes
    assert peaks["grouped"] < peaks["packed"]
    assert built.prediction.predicted_peak_bytes == peaks[mode]


def test_a_seed_of_the_data_keeps_the_validation_rows(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Seeds of training are compared on the same rows; None is the seed of training."""

    def validation(name: str, seed: int, data_seed: int | None) -> list[int]:
        small = recipe(tiny(), write_rows(tmp_path / "rows.jsonl", 24), seed=seed).recipe
        data = small.data.model_copy(update={"seed": data_seed})
        (tmp_path / name).mkdir()
        chosen = small.model_copy(update={"data": data})
        prepared = build.prepare_data(
            chosen, build.prepare_model(chosen), tmp_path / name, unchanged=False
        )
        assert prepared.validation is not None
        return prepared.validation.hashes().tolist()

    first = validation("a", 0, None)
    assert validation("b", 1, 0) == first
    assert validation("c", 1, None) != first

"""Runs whose rows begin alike: the losses of rows computed one by one, at fewer positions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_slim.config.load import from_values
from mlx_slim.errors import Interrupted
from mlx_slim.events import Notice, StepDone
from mlx_slim.finetuning.run import finetune
from tests.support.runs import CtrlC, Recorder, losses, recipe
from tests.support.tiny import TinyModels

SYSTEM = "Answer with one word, in lower case, and nothing else."


def rows_with_a_system_message(path: Path) -> Path:
    """Write 24 short rows behind one system message."""
    texts = [f"{chr(97 + i)}{'.' * (i % 5)}?" for i in range(24)]
    messages = [
        [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": text},
            {"role": "assistant", "content": text[0]},
        ]
        for text in texts
    ]
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in messages))
    return path


def run(tiny: TinyModels, rows: Path, out: Path, method: str = "lora", **train: object) -> Recorder:
    values = recipe(tiny("llama"), rows, method).recipe.model_dump(exclude_unset=True)
    values["adapter"]["dropout"] = 0.0
    values["train"] |= {"steps": 4, "batch_tokens": 512, "batching": "grouped", **train}
    recorder = Recorder()
    finetune(from_values(values, "small", "test"), out, observer=recorder)
    return recorder


def computed(recorder: Recorder) -> int:
    return sum(e.computed_tokens for e in recorder.events if isinstance(e, StepDone))


def notices(recorder: Recorder) -> str:
    return "\n".join(event.message for event in recorder.events if isinstance(event, Notice))


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "dora"])
def test_losses_are_those_of_rows_one_by_one(tiny: TinyModels, tmp_path: Path, method: str) -> None:
    rows = rows_with_a_system_message(tmp_path / "rows.jsonl")
    shared = run(tiny, rows, tmp_path / "shared", method)
    plain = run(tiny, rows, tmp_path / "plain", method, prefix_sharing=False)
    expected = losses(tmp_path / "plain")
    assert losses(tmp_path / "shared") == pytest.approx(expected, rel=1e-5)
    assert computed(shared) < 0.6 * computed(plain)
    assert "fewer positions are computed" in notices(shared)
    assert "fewer positions" not in notices(plain)


def test_stopped_and_resumed_it_repeats_every_bit(tiny: TinyModels, tmp_path: Path) -> None:
    rows = rows_with_a_system_message(tmp_path / "rows.jsonl")
    same = {"steps": 6, "batch_tokens": 512, "batching": "grouped", "prefix_sharing": True}
    finetune(recipe(tiny("llama"), rows, **same), tmp_path / "straight", observer=Recorder())
    out = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        finetune(recipe(tiny("llama"), rows, **same), out, observer=CtrlC())
    finetune(recipe(tiny("llama"), rows, **same), out, observer=Recorder(), resume=True)
    assert losses(out) == losses(tmp_path / "straight")


def test_where_it_cannot_share_it_says_so_once_and_trains(tiny: TinyModels, tmp_path: Path) -> None:
    rows = rows_with_a_system_message(tmp_path / "rows.jsonl")
    compiled = run(tiny, rows, tmp_path / "a", steps=1, compile=True, prefix_sharing=True)
    assert notices(compiled).count("no effect in a compiled step") == 1
    packed = run(tiny, rows, tmp_path / "b", steps=1, batching="packed", prefix_sharing=True)
    assert notices(packed).count("no effect in packed sequences") == 1
    values = recipe(tiny("gemma3_text"), rows).recipe.model_dump(exclude_unset=True)
    values["train"] |= {"steps": 1, "prefix_sharing": True}
    recorder = Recorder()
    finetune(from_values(values, "small", "test"), tmp_path / "c", observer=recorder)
    assert notices(recorder).count("computed one by one") == 1

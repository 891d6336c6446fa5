"""A run that version 0.1 began resumes bit for bit, under today's names, with a notice for each.

The files are today's, with the names that 0.1 wrote put back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.artifacts import load_tensors
from mlx_slim.config.load import Resolved, from_values
from mlx_slim.errors import Interrupted
from mlx_slim.events import Notice
from mlx_slim.finetuning.run import finetune
from tests.support.runs import CtrlC, Recorder, losses, recipe, write_rows


def _recipe(model: Path, data: Path, text: Path) -> Resolved:
    values = recipe(model, data).recipe.model_dump(mode="json", exclude_unset=True)
    values["forgetting"] = {"path": str(text), "every": 2, "max_rise": 9.0}
    values["quantize"] = {"group_size": 32, "qat": True}
    adaptive = {"target_rank": 3, "warmup": 1, "final": 2, "interval": 1}
    values["adapter"] = {"rank": 6, "dropout": 0.1, "adaptive": adaptive}
    return from_values(values, "small", "test")


def _rewrite(file: Path, change: Any) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def _as_0_1_wrote_it(run: Path) -> None:
    """Put the old names back: recipe, train state, arrays of callbacks."""

    def old_recipe(record: dict[str, Any]) -> dict[str, Any]:
        values = record["recipe"]
        values["held_out"] = values.pop("forgetting")
        values["quantize"]["aware"] = values["quantize"].pop("qat")
        return record

    def old_state(state: dict[str, Any]) -> dict[str, Any]:
        del state["required"]
        forgetting = state.pop("callbacks")["forgetting"]
        texts[step] = bytes.fromhex(forgetting["text"])
        return state | {f"held_out_{name}": forgetting[name] for name in ("start", "step", "over")}

    _rewrite(run / "recipe.json", old_recipe)
    for step in (run / "checkpoints").iterdir():
        texts: dict[Path, bytes] = {}
        _rewrite(step / "state.json", old_state)
        arrays = load_tensors(step / "callbacks.safetensors")
        old = {name.replace("adalora/", "1/"): array for name, array in arrays.items()}
        old["2/text"] = mx.array(list(texts[step]), mx.uint8)
        mx.save_safetensors(str(step / "companions.safetensors"), old)
        (step / "callbacks.safetensors").unlink()


def test_it_resumes_bit_for_bit(tiny: Any, tmp_path: Path) -> None:
    data, text = write_rows(tmp_path / "rows.jsonl"), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 12)
    resolved = _recipe(tiny("llama"), data, text)
    straight, out = tmp_path / "straight", tmp_path / "run"
    finetune(resolved, straight, observer=Recorder())
    with pytest.raises(Interrupted):
        finetune(resolved, out, observer=CtrlC())
    _as_0_1_wrote_it(out)
    recorder = Recorder()
    finetune(resolved, out, observer=recorder, resume=True)
    notices = [event.message for event in recorder.events if isinstance(event, Notice)]
    for old, new in (("held_out", "forgetting"), ("quantize.aware", "quantize.qat")):
        expected = f"{old} ({out / 'recipe.json'}) is called {new} now"
        assert sum(text.startswith(expected) for text in notices) == 1
    assert losses(out) == losses(straight)
    for name in ("adapters/adapters.safetensors", "model/model.safetensors"):
        assert (out / name).read_bytes() == (straight / name).read_bytes()
    latest = max((out / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    assert (latest / "callbacks.safetensors").exists()
    assert not (latest / "companions.safetensors").exists()

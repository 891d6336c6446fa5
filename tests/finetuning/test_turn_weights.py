"""Fine-tunes on rows whose turns have weights: resumed bit for bit, whatever the batches."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_slim.config.load import from_values
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.events import Event, Notice, StepDone
from mlx_slim.finetuning.run import finetune
from tests.support.runs import Recorder, losses, recipe

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


class CtrlC(Recorder):
    """Sends this process SIGINT after a step."""

    def notify(self, event: Event) -> None:
        super().notify(event)
        if isinstance(event, StepDone) and event.step == 5:
            os.kill(os.getpid(), signal.SIGINT)


def write_chats(path: Path, weight: float, count: int = 24) -> Path:
    rows = []
    for i in range(count):
        turns = [
            {"role": "user", "content": f"{i}?"},
            {"role": "assistant", "content": "no" * (1 + i % 4), "weight": weight},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": f"yes {i}"},
        ]
        rows.append({"messages": turns, **({"tools": [TOOL]} if i == 3 else {})})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("batching", ["grouped", "packed"])
def test_weighted_rows_resume_bit_for_bit(
    tiny: Callable[..., Path], tmp_path: Path, batching: str
) -> None:
    model, data = tiny("llama"), write_chats(tmp_path / "rows.jsonl", 0.25)
    straight, recorder = tmp_path / "straight", Recorder()
    finetune(recipe(model, data, batching=batching), straight, observer=recorder)
    out = tmp_path / "killed"
    with pytest.raises(Interrupted):
        finetune(recipe(model, data, batching=batching), out, observer=CtrlC())
    write_chats(data, 0.5)
    with pytest.raises(SlimError, match=r"the data of .* changed"):
        finetune(recipe(model, data, batching=batching), out, observer=Recorder(), resume=True)
    write_chats(data, 0.25)
    finetune(recipe(model, data, batching=batching), out, observer=Recorder(), resume=True)
    assert losses(out) == losses(straight)
    messages = [event.message for event in recorder.events if isinstance(event, Notice)]
    assert messages[0].endswith("tools that the template leaves out: 1 (first: rows.jsonl, line 4)")


def test_weight_0_is_what_learning_the_last_answer_is(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model, counts = tiny("llama"), []
    for name, weight, learn in (("all", 1, "all"), ("zero", 0, "all"), ("last", 1, "last")):
        data = write_chats(tmp_path / f"{name}.jsonl", weight)
        values = recipe(model, data).recipe.model_dump(mode="json", exclude_unset=True)
        values["data"]["learn"] = learn
        recorder = Recorder()
        finetune(from_values(values, "small", "test"), tmp_path / name, observer=recorder)
        steps = [event for event in recorder.events if isinstance(event, StepDone)]
        counts.append(sum(event.supervised_tokens for event in steps))
    assert counts[0] > counts[1] == counts[2]
    assert losses(tmp_path / "zero") == losses(tmp_path / "last") != losses(tmp_path / "all")

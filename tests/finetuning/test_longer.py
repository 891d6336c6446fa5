"""A run that is resolved more steps goes on as one that began so long, or says that it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.cli.main import run as command
from mlx_slim.config.load import Resolved, from_values
from mlx_slim.errors import SlimError
from mlx_slim.events import Notice
from mlx_slim.finetuning.run import finetune
from tests.support.runs import Recorder, losses, recipe, run_until_killed, write_rows
from tests.support.tiny import TinyModels

EXACT = {"constant": {"schedule": "constant"}, "wsd": {"schedule": "wsd", "decay": 0.5}}
FALLING = {"cosine": {"schedule": "cosine"}, "linear": {"schedule": "linear", "min_lr_ratio": 0.1}}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def small_recipe(
    model: Path, rows: Path, method: str = "lora", watched: Path | None = None, **train: Any
) -> Resolved:
    """Return a recipe, with a text to measure forgetting on if there is one."""
    resolved = recipe(model, rows, method, **{"keep": 1, "validate_every": 3, **train})
    if watched is None:
        return resolved
    forgetting = {"path": str(watched), "every": 4, "max_rise": 100}
    values = resolved.recipe.model_dump(mode="json", exclude_unset=True)
    return from_values({**values, "forgetting": forgetting}, "small", "test")


def lines(run: Path, *names: str) -> list[dict]:
    """Return the events of a run, without what is measured anew every time."""
    records = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for key in list(record):
            if key.endswith("_bytes") or key in ("seconds", "tokens_per_second", "message"):
                del record[key]
        if record["event"] in names:
            records.append(record)
    return records


def weights(run: Path) -> dict[str, bytes]:
    """Return what a run made, byte for byte."""
    files = [path for name in ("adapters", "model", "base") for path in (run / name).glob("*")]
    assert files
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def same_result(one: Path, other: Path) -> None:
    events = ("step", "validation", "forgetting")
    assert lines(one, *events) == lines(other, *events)
    assert weights(one) == weights(other)
    done = [json.loads((run / "run.json").read_text())["result"]["done"] for run in (one, other)]
    for key in ("step", "reason", "tokens", "best_validation", "best_step", "result_step"):
        assert done[0][key] == done[1][key]


@pytest.mark.parametrize(("name", "method"), [("constant", "lora"), ("wsd", "full")])
def test_a_longer_run_equals_one_that_began_so_long(
    tiny: TinyModels, rows: Path, tmp_path: Path, name: str, method: str
) -> None:
    watched = tmp_path / "text.txt"
    watched.write_text("a text that is watched, and not learned\n" * 4)
    train = {"method": method, "watched": watched, **EXACT[name]}
    finetune(
        small_recipe(tiny("llama"), rows, steps=14, **train), tmp_path / "a", observer=Recorder()
    )
    out = tmp_path / "b"
    for steps in (5, 10, 14):  # 5 and 10 are no steps of a validation: those were of the end alone
        recorder = Recorder()
        resolved = small_recipe(tiny("llama"), rows, steps=steps, **train)
        finetune(resolved, out, observer=recorder, resume=steps > 5)
        notices = [event.message for event in recorder.events if isinstance(event, Notice)]
        assert (
            any(f"as a run that begins with {steps} steps" in text for text in notices) or steps < 6
        )
        assert (name == "wsd" and steps > 5) == any("are taken again" in text for text in notices)
    same_result(tmp_path / "a", out)
    record = json.loads((out / "run.json").read_text())
    assert record["extended"] == {"warmup": 1, "totals": [5, 10]}
    assert [line["total_steps"] for line in lines(out, "started")] == [5, 10, 14]


@pytest.mark.parametrize("name", list(FALLING))
def test_a_falling_rate_goes_on_from_where_it_stood(
    tiny: TinyModels, rows: Path, tmp_path: Path, name: str
) -> None:
    train = FALLING[name]
    straight = small_recipe(tiny("llama"), rows, steps=12, **train)
    finetune(straight, tmp_path / "a", observer=Recorder())
    out, recorder = tmp_path / "b", Recorder()
    finetune(small_recipe(tiny("llama"), rows, steps=6, **train), out, observer=Recorder())
    first = lines(out, "step")
    finetune(straight, out, observer=recorder, resume=True)
    notices = [event.message for event in recorder.events if isinstance(event, Notice)]
    assert any("other losses" in text and f"({name})" in text for text in notices)
    records = lines(out, "step")
    assert records[:6] == first and len(records) == 12
    rates = [line["learning_rate"] for line in records]
    assert rates[6] == rates[5] and rates[6:] == sorted(rates[6:], reverse=True)
    begun = lines(tmp_path / "a", "step")  # the same rows in the same order
    assert [line["tokens"] for line in records] == [line["tokens"] for line in begun]
    assert [line["loss"] for line in records] != [line["loss"] for line in begun]


KILL_SCRIPT = """
import os, signal, sys
from pathlib import Path
from mlx_slim.finetuning import run as module
from tests.support.runs import Recorder
from tests.finetuning.test_longer import EXACT, FALLING, small_recipe

model, rows, out, name, moment, number = sys.argv[1:7]
number = int(number)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Observer:
    def notify(self, event):
        if event.name == moment and getattr(event, "step", number) == number:
            die()

if moment == "record":  # recipe.json says the new length, run.json is still there
    from mlx_slim.finetuning import run_dir
    write = run_dir.write_json
    run_dir.write_json = lambda path, value: (write(path, value), die())
if moment == "rewind":
    module.MetricsFile.rewind = lambda *_: die()
if moment == "remove":
    from mlx_slim.training import rotation
    rotation.remove_after = lambda *_: die()
train = {**EXACT, **FALLING}[name]
resolved = small_recipe(Path(model), Path(rows), steps=12, **train)
module.finetune(resolved, Path(out), observer=Observer(), resume=True)
"""


@pytest.mark.parametrize(
    ("name", "moments"),
    [
        ("wsd", [("record", 0), ("remove", 0), ("step", 5)]),
        ("cosine", [("rewind", 0), ("step", 8)]),
    ],
)
def test_a_kill_of_the_longer_run_changes_nothing(
    tiny: TinyModels, rows: Path, tmp_path: Path, name: str, moments: list[tuple[str, int]]
) -> None:
    train = {**EXACT, **FALLING}[name]
    finetune(
        small_recipe(tiny("llama"), rows, steps=6, **train), tmp_path / "a", observer=Recorder()
    )
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    longer = small_recipe(tiny("llama"), rows, steps=12, **train)
    finetune(longer, tmp_path / "a", observer=Recorder(), resume=True)
    out = tmp_path / "b"
    for moment, number in moments:
        run_until_killed(KILL_SCRIPT, tiny("llama"), rows, out, name, moment, number)
        assert (out / "run.json").exists() == (moment == "record")
        assert json.loads((out / "recipe.json").read_text())["recipe"]["train"]["steps"] == 12
    finetune(longer, out, observer=Recorder(), resume=True)
    same_result(tmp_path / "a", out)


def contents(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_fewer_steps_are_refused_and_as_many_are_complete(
    tiny: TinyModels, rows: Path, tmp_path: Path
) -> None:
    out, recorder = tmp_path / "run", Recorder()
    whole = {"steps": None, "epochs": 1}
    done = finetune(small_recipe(tiny("llama"), rows, **whole), out, observer=Recorder()).done
    before = contents(out)
    for fewer in ({"epochs": 0.5}, {"steps": done.step - 1}):
        with pytest.raises(SlimError, match="are fewer") as caught:
            finetune(
                small_recipe(tiny("llama"), rows, **{**whole, **fewer}),
                out,
                observer=Recorder(),
                resume=True,
            )
        assert "\n" not in str(caught.value)
    same = small_recipe(tiny("llama"), rows, steps=done.step)
    assert finetune(same, out, observer=recorder, resume=True).done == done
    assert "nothing to do" in recorder.events[-1].as_record()["message"]
    assert contents(out) == before
    finetune(
        small_recipe(tiny("llama"), rows, steps=None, epochs=2), out, observer=recorder, resume=True
    )
    assert len(losses(out)) == 2 * done.step


def test_what_cannot_grow_is_refused_and_left_as_it_was(
    tiny: TinyModels, rows: Path, tmp_path: Path
) -> None:
    stopped = {"schedule": "constant", "learning_rate": 1.0, "early_stopping": 1}
    stopped |= {"validate_every": 1}
    wsd = {"steps": 6, **EXACT["wsd"]}
    cases = {
        "train.early_stopping stopped it after": stopped,
        "before its learning rate decayed": wsd,
        "checkpoints were removed": {"steps": 4, "schedule": "constant"},
    }
    for number, (why, train) in enumerate(cases.items()):
        out = tmp_path / str(number)
        finetune(small_recipe(tiny("llama"), rows, **train), out, observer=Recorder())
        if why == "before its learning rate decayed":
            for path in (out / "checkpoints").glob("step-[!6]"):
                shutil.rmtree(path)
        elif train is not stopped:
            shutil.rmtree(out / "checkpoints")
        before = contents(out)
        with pytest.raises(SlimError, match=why):
            longer = small_recipe(tiny("llama"), rows, **{**train, "steps": 20})
            finetune(longer, out, observer=Recorder(), resume=True)
        assert contents(out) == before


def test_ranks_that_were_laid_out_over_fewer_steps_do_not_grow(
    tiny: TinyModels, rows: Path, tmp_path: Path
) -> None:
    def adaptive(steps: int):
        values = small_recipe(tiny("llama"), rows, steps=steps).recipe.model_dump(
            mode="json", exclude_unset=True
        )
        values["adapter"] = {"rank": 4, "adaptive": {"target_rank": 2}}
        return from_values(values, "small", "test")

    finetune(adaptive(6), tmp_path / "run", observer=Recorder())
    with pytest.raises(SlimError, match="scheduled its ranks for 6 steps"):
        finetune(adaptive(12), tmp_path / "run", observer=Recorder(), resume=True)
    assert (tmp_path / "run" / "run.json").exists()


def test_a_warm_up_that_is_another_fraction_is_reported(
    tiny: TinyModels, rows: Path, tmp_path: Path
) -> None:
    out, recorder, train = tmp_path / "run", Recorder(), {"schedule": "constant", "warmup": 0.3}
    finetune(small_recipe(tiny("llama"), rows, steps=4, **train), out, observer=Recorder())
    longer = small_recipe(tiny("llama"), rows, steps=8, **train)
    finetune(longer, out, observer=recorder, resume=True)
    notices = " ".join(event.message for event in recorder.events if isinstance(event, Notice))
    assert "the warm-up stays 2 steps" in notices and "8 has 3" in notices
    rates = [line["learning_rate"] for line in lines(out, "step")]
    assert rates == [5e-4] + [1e-3] * 7


def test_the_command_line_raises_the_steps(
    tiny: TinyModels, rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(
        f"model: {tiny('llama')}\ndata: {{path: {rows}, validation: 0}}\n"
        "train: {steps: 3, max_length: 128, batch_tokens: 256, schedule: constant}\n"
    )
    words = ["train", str(file), "-o", str(tmp_path / "run")]
    assert command(words) == 0
    assert command([*words, "train.steps=5"]) == 2  # --resume is not resolved
    assert command([*words, "--resume", "train.steps=2"]) == 2
    assert capfd.readouterr().err.count("error:") == 2
    assert command([*words, "--resume", "train.steps=5"]) == 0
    assert "as a run that begins with 5 steps" in capfd.readouterr().out
    assert len(losses(tmp_path / "run")) == 5

"""The whole distillation on tiny models: what it learns, writes, resumes and refuses."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load as stock_load

from mlx_slim import events
from mlx_slim.artifacts import load_tensors
from mlx_slim.config.load import Resolved, from_values
from mlx_slim.data.batches import Batcher
from mlx_slim.data.shapes import SHAPES
from mlx_slim.distillation.run import distill
from mlx_slim.errors import Interrupted, ResourceError, SlimError
from mlx_slim.events import Event
from mlx_slim.finetuning import build as prepare
from mlx_slim.finetuning.run import finetune
from tests.support.runs import Recorder, losses, recipe, run_until_killed, write_rows
from tests.support.tiny import byte_tokenizer, tiny_model


def recipe_with_teachers(
    model: Path,
    data: Path,
    teachers: list[dict[str, Any]],
    tuning: str = "lora",
    train: dict[str, Any] | None = None,
    **distillation: Any,
) -> Resolved:
    """The small recipe with teachers."""
    plain = recipe(model, data, tuning, **(train or {}))
    values = plain.recipe.model_dump(exclude={"distill"}, exclude_unset=True)
    values["distill"] = {"teachers": teachers, "top_k": 16, **distillation}
    return from_values(values, "small", "test")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A tiny model that has learned the rows; of another seed and depth than the students."""
    folder = tmp_path_factory.mktemp("teacher")
    start = tiny_model(folder / "start", seed=7, num_hidden_layers=2)
    steps = {"steps": 25, "learning_rate": 5e-3, "save_every": 100, "validate_every": 100}
    finetune(recipe(start, data, "full", **steps), folder / "run", observer=Recorder())
    return folder / "run" / "model"


def validations(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "validation"]


@pytest.mark.parametrize("method", ["full", "lora", "dora", "qlora"])
def test_every_method_learns_from_a_teacher(
    tiny: Callable[..., Path], data: Path, teacher: Path, tmp_path: Path, method: str
) -> None:
    out, recorder = tmp_path / "run", Recorder()
    fast = {"learning_rate": 1e-2, "steps": 12}
    run = recipe_with_teachers(tiny("llama"), data, [{"model": str(teacher)}], method, fast)
    result = distill(run, out, observer=recorder)
    results = losses(out)
    assert results[12] < results[1]
    steps = [e for e in recorder.events if isinstance(e, events.StepDone)]
    for step in steps:  # λ = 0.5, T = 1
        assert step.metrics is not None
        mixed = 0.5 * step.metrics["cross_entropy"] + 0.5 * step.metrics["divergence"]
        assert step.loss == pytest.approx(mixed, rel=1e-5)
    assert steps[-1].metrics["divergence"] < steps[0].metrics["divergence"]  # type: ignore[index]
    if method == "full":
        stock_load(str(out / "model"))
    else:
        stock_load(str(tiny("llama")), adapter_path=str(out / "adapters"))
    record = json.loads((out / "run.json").read_text())["distill"]
    assert record["method"] == "logits"
    assert record["teachers"][0]["kept"] == 16
    assert record["cache_bytes"] == sum(f.stat().st_size for f in out.glob("targets/*/*.bin"))
    assert result.done.reason == "complete"


def test_distillation_lowers_the_divergence(data: Path, teacher: Path, tmp_path: Path) -> None:
    """At equal steps: held-out divergence from the teacher, over all tokens."""
    student = tiny_model(tmp_path / "student", seed=1)
    steps = {"steps": 30, "learning_rate": 3e-3, "validate_every": 30, "save_every": 30}
    results = {}
    for weight in (0.0, 1.0):
        run = recipe_with_teachers(
            student, data, [{"model": str(teacher)}], "full", steps, weight=weight, top_k="all"
        )
        distill(run, tmp_path / f"{weight}", observer=Recorder())
        results[weight] = validations(tmp_path / f"{weight}")[-1]["parts"]["divergence"]
    assert results[1.0] < 0.6 * results[0.0]


@pytest.mark.parametrize("method", ["lora", "full", "qlora"])
def test_weight_zero_is_plain_fine_tuning_bit_for_bit(
    tiny: Callable[..., Path], data: Path, teacher: Path, tmp_path: Path, method: str
) -> None:
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    finetune(recipe(tiny("llama"), data, method), plain, observer=Recorder())
    zero = recipe_with_teachers(
        tiny("llama"), data, [{"model": str(teacher)}], method, weight=0, temperature=2
    )
    distill(zero, ours, observer=Recorder())
    assert losses(ours) == losses(plain)
    scored = [[line["loss"] for line in validations(run)] for run in (plain, ours)]
    assert scored[0] == scored[1]
    assert all(line["parts"]["divergence"] > 0 for line in validations(ours))


def test_the_divergence_of_a_student_from_itself_is_zero(
    tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    recorder = Recorder()
    same = recipe_with_teachers(
        tiny("llama"), data, [{}], "full", {"steps": 1}, weight=1, temperature=2
    )
    distill(same, tmp_path / "run", observer=recorder)
    (step,) = [e for e in recorder.events if isinstance(e, events.StepDone)]
    assert abs(step.loss) < 1e-5
    assert step.grad_norm < 1e-4


def test_teachers_count_by_weight_and_equal_ones_are_one(
    tiny: Callable[..., Path], data: Path, teacher: Path, tmp_path: Path
) -> None:
    other = str(tiny_model(tmp_path / "other", seed=3))
    first = {}
    for name, teachers in {
        "a": [{"model": str(teacher)}],
        "b": [{"model": other}],
        "both": [{"model": str(teacher), "weight": 3}, {"model": other, "weight": 1}],
    }.items():
        run = recipe_with_teachers(tiny("llama"), data, teachers, "full", {"steps": 1}, weight=1)
        distill(run, tmp_path / name, observer=Recorder())
        first[name] = losses(tmp_path / name)[1]
    assert first["both"] == pytest.approx(0.75 * first["a"] + 0.25 * first["b"], rel=1e-5)


def test_a_shared_cache_is_written_once(
    tiny: Callable[..., Path],
    data: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = str(tmp_path / "cache")
    run = recipe_with_teachers(tiny("llama"), data, [{"model": str(teacher)}], cache=cache)
    distill(run, tmp_path / "one", observer=Recorder())
    monkeypatch.setattr("mlx_slim.distillation.logits.load_teacher", None)  # asking it would fail
    other = recipe_with_teachers(
        tiny("llama"), data, [{"model": str(teacher)}], cache=cache, weight=0.9
    )
    distill(other, tmp_path / "two", observer=Recorder())
    assert not (tmp_path / "two" / "targets").exists()


KILL_SCRIPT = """
import os, signal, sys
from pathlib import Path
from mlx_slim.distillation import target_cache
from mlx_slim.distillation.run import distill
from tests.distillation.test_run import recipe_with_teachers

model, data, teacher, out, moment, count, resume = sys.argv[1:8]
asked = []

class Observer:
    def notify(self, event):
        if moment == "step" and event.name == "step" and event.step == int(count):
            os.kill(os.getpid(), signal.SIGKILL)

if moment == "cache":
    put = target_cache._put
    def dies(handle, numbers, values):
        asked.append(1)
        if len(asked) == int(count):  # in the middle of a batch: some of its files are written
            os.kill(os.getpid(), signal.SIGKILL)
        put(handle, numbers, values)
    target_cache._put = dies
run = recipe_with_teachers(Path(model), Path(data), [{"model": teacher}])
distill(run, Path(out), observer=Observer(), resume=resume == "1")
"""


def test_killed_while_asking_and_while_learning_equals_uninterrupted(
    tiny: Callable[..., Path], data: Path, teacher: Path, tmp_path: Path
) -> None:
    run = recipe_with_teachers(tiny("llama"), data, [{"model": str(teacher)}])
    straight, out = tmp_path / "straight", tmp_path / "killed"
    distill(run, straight, observer=Recorder())
    for number, (moment, count) in enumerate([("cache", 7), ("step", 5)]):
        words = [tiny("llama"), data, teacher, out, moment, count, int(number > 0)]
        run_until_killed(KILL_SCRIPT, *words)
        marks = [np.fromfile(file, np.uint8) for file in out.glob("targets/*/done.bin")]
        assert sum(bool(of_set.all()) for of_set in marks) == (2 if moment == "step" else 0)
    distill(run, out, observer=Recorder(), resume=True)
    assert losses(out) == losses(straight)
    for file in (straight / "adapters").glob("*.safetensors"):
        ours, theirs = load_tensors(file), load_tensors(out / "adapters" / file.name)
        assert all(mx.array_equal(ours[key], theirs[key]).item() for key in ours)


class CtrlC(Recorder):
    """Sends this process SIGINT when a teacher is loaded."""

    def notify(self, event: Event) -> None:
        super().notify(event)
        if isinstance(event, events.Notice) and "tokens, 16 logits each" in event.message:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_keeps_the_targets_so_far(
    tiny: Callable[..., Path], data: Path, teacher: Path, tmp_path: Path
) -> None:
    run = recipe_with_teachers(tiny("llama"), data, [{"model": str(teacher)}])
    out = tmp_path / "run"
    with pytest.raises(Interrupted, match="while targets were computed") as caught:
        distill(run, out, observer=CtrlC())
    assert "mlx-slim distill small" in caught.value.hint
    assert list(out.glob("targets/*/about.json"))
    distill(run, out, observer=Recorder(), resume=True)
    assert sorted(losses(out)) == list(range(1, 11))


def test_training_needs_the_memory_of_the_student_only(
    tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """The peak of training holds nothing of a teacher that weighs more than all of it."""
    large = tiny_model(tmp_path / "large", hidden_size=256, intermediate_size=1024)
    peaks = {}
    for name, model in {"large": large, "own": tiny("llama")}.items():
        run = recipe_with_teachers(tiny("llama"), data, [{"model": str(model)}], train={"steps": 2})
        recorder = Recorder()
        distill(run, tmp_path / "runs" / name, observer=recorder)
        (done,) = [e for e in recorder.events if isinstance(e, events.Done)]
        peaks[name] = done.peak_memory_bytes
    weights = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert weights > 2 * peaks["own"]
    assert peaks["large"] < peaks["own"] + 0.2 * weights  # threads meet now and then


def test_logits_refuse_a_different_tokenizer(
    tiny: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_model(tmp_path / "other")
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    path.write_text(json.dumps(content))
    out = tmp_path / "run"
    strict = recipe_with_teachers(tiny("llama"), data, [{"model": str(other)}])
    with pytest.raises(SlimError, match="2 have different ids, such as 'A'"):
        distill(_with(strict, method="logits"), out, observer=Recorder())
    recorder = Recorder()
    taken = []
    monkeypatch.setattr(
        "mlx_slim.distillation.run.learn_from_texts",
        lambda resolved, out, teachers, method, **_: taken.append((teachers[0].model, method)),
    )
    distill(strict, out, observer=recorder)
    assert taken == [(str(other), "sequence")]
    messages = [e.message for e in recorder.events if isinstance(e, events.Notice)]
    assert "2 have different ids" in messages[0]
    assert "training on texts" in messages[1]
    assert not out.exists()


def _with(resolved: Resolved, **changes: Any) -> Resolved:
    from dataclasses import replace

    assert resolved.recipe.distill is not None
    section = resolved.recipe.distill.model_copy(update=changes)
    return replace(resolved, recipe=resolved.recipe.model_copy(update={"distill": section}))


def test_another_end_alone_is_a_warning_for_logits(
    tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    other = tiny_model(tmp_path / "other", seed=2)
    byte_tokenizer(other, chat_template=None)
    recorder = Recorder()
    run = recipe_with_teachers(tiny("llama"), data, [{"model": str(other)}], train={"steps": 1})
    distill(_with(run, method="logits"), tmp_path / "run", observer=recorder)
    warnings = [e for e in recorder.events if isinstance(e, events.Notice) and e.level == "warning"]
    assert "eos is '<|im_end|>' for the student" in warnings[0].message


def test_bad_input_leaves_no_folder(
    tiny: Callable[..., Path], data: Path, teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(SlimError, match="has no teachers"):
        distill(recipe(tiny("llama"), data), out, observer=Recorder())
    with pytest.raises(SlimError, match="mlx-slim distill small"):
        finetune(
            recipe_with_teachers(tiny("llama"), data, [{"model": str(teacher)}]),
            out,
            observer=Recorder(),
        )
    with pytest.raises(SlimError, match="nowhere"):
        distill(
            recipe_with_teachers(tiny("llama"), data, [{"model": "./nowhere"}]),
            out,
            observer=Recorder(),
        )
    assert not out.exists()


def test_a_disk_or_a_budget_that_is_too_small_is_refused_before(
    tiny: Callable[..., Path],
    data: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = recipe_with_teachers(tiny("llama"), data, [{"model": str(teacher)}])
    memory = run.recipe.memory.model_copy(update={"budget": "100kB"})
    tight = run.recipe.model_copy(update={"memory": memory})
    with pytest.raises(ResourceError, match="weights of teacher model need"):
        distill(Resolved(tight, run.origins, "small", "small"), tmp_path / "a", observer=Recorder())
    monkeypatch.setattr(
        "mlx_slim.distillation.target_cache.check_disk",
        lambda cache, needed: (_ for _ in ()).throw(ResourceError(f"{needed} bytes")),
    )
    with pytest.raises(ResourceError, match=r"\d{4,} bytes"):
        distill(run, tmp_path / "a", observer=Recorder())
    assert not (tmp_path / "a").exists()


def test_the_try_before_the_teachers_is_one_of_the_shapes(
    tmp_path: Path,
    tiny: Callable[..., Path],
    data: Path,
    teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mx, "compile", lambda function, **_: function)
    limits: list[int] = []

    class Limited(Batcher):
        def __init__(self, *settings: Any) -> None:
            limits.append(settings[-1])
            super().__init__(*settings)

    monkeypatch.setattr(prepare, "Batcher", Limited)
    small = recipe_with_teachers(
        tiny("llama"), data, [{"model": str(teacher)}], train={"steps": 1, "compile": True}
    )
    distill(small, tmp_path / "run", observer=Recorder())
    before, after = limits[:2], limits[2:]
    assert before == after and len(after) == 2  # the same rows and shapes, of training and held out
    assert 1 + sum(after) <= SHAPES
